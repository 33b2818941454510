"""Latents to pictures."""

import torch


def decoded(vae, samples: torch.Tensor) -> torch.Tensor:
    """A LATENT's samples → pictures [B, H, W, 3]; a VAE of videos gives one per frame."""
    pictures = vae.decode(samples)
    return pictures.flatten(0, 1) if pictures.ndim == 5 else pictures
