"""LATENTs and CONDITIONINGs in core's training conventions → a data set of the core."""

from collections.abc import Sequence

import torch

from ..deltaconv import demo
from .teacher import ComfyTeacher


def latents_of(teacher: ComfyTeacher, latents: Sequence[dict]) -> list[torch.Tensor]:
    """LATENT list → one [C, H, W] per image, as the model works on them."""
    return [
        image.clone().float()
        for latent in latents
        for image in teacher.latents_in(latent["samples"].clone())
    ]


def conditions_of(positive: Sequence) -> list[tuple[torch.Tensor, dict]]:
    """CONDITIONING list → its entries, one per caption, with tensors of their own."""
    entries = [entry for conditioning in positive for entry in conditioning]
    # Tensors of inference mode cannot take part in a backward pass.
    return [
        (
            entry[0].clone(),
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in entry[1].items()},
        )
        for entry in entries
    ]


def encode_prompts(teacher: ComfyTeacher, prompts: Sequence[str], clip) -> list:
    """Prompts → entries, by CLIP; the demo model has an encoder of its own."""
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
