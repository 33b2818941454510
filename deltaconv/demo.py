"""The packaged demo: a 7 M-parameter emoji text-to-image UNet, and ΔConv weights distilled from it.

The model draws 64 × 64 RGB pictures in −1…1 without a VAE; NOTICE says where it comes from.
"""

import json
import string
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from safetensors import safe_open

from .messages import Say, english

FAMILY = "emoji-demo"
NATIVE_SIZE = 64
MAX_WORDS = 12

_DATA = Path(__file__).parent / "data"
TEACHER_PATH = _DATA / "emoji_teacher.safetensors"
DELTACONV_PATH = _DATA / "emoji_deltaconv.safetensors"
PICTURES_PATH = _DATA / "emoji_64.png"
CAPTIONS_PATH = _DATA / "emoji_64.txt"


@dataclass(frozen=True)
class TextEncoder:
    """The demo's text encoder: one row per word of the vocabulary, row 0 for all others."""

    vocabulary: dict[str, int]
    word_embedding: torch.Tensor
    position_embedding: torch.Tensor

    def encode(self, prompt: str) -> torch.Tensor:
        """prompt → context [1, 12, 64]; unknown words and padding are row 0."""
        rows = [self.vocabulary.get(word, 0) for word in words_of(prompt)[:MAX_WORDS]]
        rows += [0] * (MAX_WORDS - len(rows))
        return (self.word_embedding[rows] + self.position_embedding)[None]

    def unknown(self, prompt: str) -> list[str]:
        """Words of the prompt outside the vocabulary, each once."""
        words = words_of(prompt)[:MAX_WORDS]
        return list(dict.fromkeys(word for word in words if word not in self.vocabulary))

    def report(self, prompt: str, say: Say = english) -> str:
        """Prompt → text in the language of `say`: unknown words, and words beyond the limit."""
        words, unknown = words_of(prompt), self.unknown(prompt)
        if not words:
            return say("prompt empty")
        sentences = []
        if unknown:
            known = len(self.vocabulary)
            sentences.append(say("prompt unknown", words=", ".join(unknown), count=known))
        if len(words) > MAX_WORDS:
            ignored = " ".join(words[MAX_WORDS:])
            sentences.append(say("prompt long", most=MAX_WORDS, words=ignored))
        known = "prompt known" if len(words) > 1 else "prompt known word"
        return " ".join(sentences) or say(known, count=len(words))


def words_of(prompt: str) -> list[str]:
    """The words as Unicode names have them: lower case, no punctuation, womans for "woman's".

    Hyphens inside a word stay: x-ray.
    """
    text = prompt.lower().replace("'", "").replace("’", "")
    spaced = "".join(" " if _separates(character) else character for character in text)
    return [word for part in spaced.split() if (word := part.strip("-"))]


def _separates(character: str) -> bool:
    if character == "-":
        return False
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def unet_config() -> dict[str, object]:
    """Arguments of ComfyUI's UNetModel for the teacher."""
    with safe_open(TEACHER_PATH, framework="pt") as file:
        return json.loads(file.metadata()["unet_config"])


@cache
def text_encoder() -> TextEncoder:
    """The packaged text encoder, in float32."""
    with safe_open(TEACHER_PATH, framework="pt") as file:
        vocabulary = json.loads(file.metadata()["vocabulary"])
        words = file.get_tensor("cond_stage_model.word_embedding.weight").float()
        positions = file.get_tensor("cond_stage_model.position_embedding.weight").float()
    return TextEncoder({word: row + 1 for row, word in enumerate(vocabulary)}, words, positions)


def captions() -> list[str]:
    """The captions of the demo's 512 training pictures."""
    return CAPTIONS_PATH.read_text(encoding="utf-8").splitlines()


def pictures() -> tuple[torch.Tensor, list[str]]:
    """The demo's training pictures [512, 3, 64, 64] in −1…1, and their captions.

    The pictures are in the repository and in wheels, not in the registry's archive.
    """
    import numpy as np
    from PIL import Image

    sheet = torch.from_numpy(np.array(Image.open(PICTURES_PATH).convert("RGB")))
    pattern = "(rows h) (columns w) c -> (rows columns) c h w"
    tiles = rearrange(sheet, pattern, h=NATIVE_SIZE, w=NATIVE_SIZE)
    return tiles.float() / 127.5 - 1, captions()
