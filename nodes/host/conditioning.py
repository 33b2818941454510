"""LATENTs and CONDITIONINGs, as ComfyUI's trainers take them, for a distillation's data set."""

import hashlib
from collections.abc import Sequence

import torch

from ...deltaconv import demo
from .teacher import ComfyTeacher


def latents_of(teacher: ComfyTeacher, latents: Sequence[dict]) -> list[torch.Tensor]:
    """LATENT list → one [C, H, W] per image, as the model works on them.

    Raises ValueError for latents of another model's number of channels, and for videos.
    """
    return [
        image.clone().float()
        for latent in latents
        for image in teacher.latents_in(latent["samples"].clone())
    ]


def conditions_of(positive: Sequence) -> list[tuple[torch.Tensor, dict]]:
    """CONDITIONING list → its entries, one per caption, with cloned tensors."""
    entries = [entry for conditioning in positive for entry in conditioning]
    # Clone: tensors made in inference mode cannot take part in a backward pass.
    return [
        (
            entry[0].clone(),
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in entry[1].items()},
        )
        for entry in entries
    ]


def digest_of(entry: tuple[torch.Tensor, dict]) -> str:
    """Digest of one entry's tensors, pooled ones included; equal contents have equal digests."""
    digest = hashlib.sha256()
    for name, value in [("", entry[0]), *sorted(entry[1].items(), key=lambda item: item[0])]:
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(repr(tuple(value.shape)).encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, str | int | float | bool):
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def encode_prompts(teacher: ComfyTeacher, prompts: Sequence[str], clip) -> list:
    """Prompts → entries, by CLIP or, for the demo model, by its packaged encoder."""
    if clip is not None:
        with torch.inference_mode():
            encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in prompts]
        return conditions_of(encoded)
    if teacher.family == demo.FAMILY:
        encoder = demo.text_encoder()
        return [(encoder.encode(text), {}) for text in prompts]
    raise ValueError(
        "Expected a CLIP to encode the prompts with, got none. Connect the checkpoint's CLIP, or "
        "connect conditioning instead of prompts."
    )
