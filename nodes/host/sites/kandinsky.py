"""Kandinsky 5. Sites are `visual_transformer_blocks.{i}.self_attention`."""

import torch

from .base import Size
from .transformer import TransformerSites

# Tokens of an encoded prompt that is no long one; any number may come.
_TOKENS = 256


class KandinskySites(TransformerSites):
    """Sites of ComfyUI's `Kandinsky5`: self_attention(x, freqs, transformer_options).

    Image models take latents [B, C, H, W], video models [B, C, T, H, W]. The
    `text_transformer_blocks` are no sites.
    """

    BLOCKS, ATTENTION = "visual_transformer_blocks", "self_attention"
    ARGUMENTS = ("freqs", "transformer_options")
    VALUE, FOLLOWING = "to_value", "cross_attention_norm"

    @classmethod
    def is_kind(cls, transformer: torch.nn.Module) -> bool:
        from comfy.ldm.kandinsky5.model import Kandinsky5

        return isinstance(transformer, Kandinsky5)

    def beside(self, given) -> str:
        # The module knows no attn1 patches.
        return ""

    def positions(self, diffusion_model, x: torch.Tensor, size: Size) -> dict:
        cells = (side * self.latent_step for side in size)
        return {"freqs": diffusion_model.rope_encode_3d(1, *cells, device=x.device, dtype=x.dtype)}

    def text_shape(self, diffusion_model: torch.nn.Module) -> Size:
        return _TOKENS, diffusion_model.text_embeddings.in_layer.in_features

    def prompt(self, diffusion_model: torch.nn.Module) -> list:
        pooled = diffusion_model.pooled_text_embeddings.in_layer.in_features
        text = torch.randn(1, *self.text_shape(diffusion_model))
        return [text, {"pooled_output": torch.randn(1, pooled)}]
