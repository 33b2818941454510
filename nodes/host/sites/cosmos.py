"""Anima and Cosmos-Predict2, text to image. Sites are `blocks.{i}.self_attn`."""

from collections.abc import Callable

import torch

from .base import Size
from .transformer import TransformerSites

# What a prompt is padded to.
_T5_TOKENS = 512


class CosmosSites(TransformerSites):
    """Sites of ComfyUI's `MiniTrainDIT`: self_attn(x, context, rope_emb, transformer_options).

    The text modules of Anima's `llm_adapter` are no sites.
    """

    ARGUMENTS = ("context", "rope_emb", "transformer_options")
    VALUE, HEADS, FOLLOWING = "v_proj", "n_heads", "layer_norm_cross_attn"

    @classmethod
    def is_kind(cls, transformer: torch.nn.Module) -> bool:
        from comfy.ldm.cosmos.predict2 import MiniTrainDIT

        return isinstance(transformer, MiniTrainDIT)

    @classmethod
    def step(cls, transformer: torch.nn.Module) -> int:
        return transformer.patch_spatial

    @classmethod
    def family_of(cls, transformer: torch.nn.Module, exact: str) -> str:
        # The same layers, told apart by what else they were loaded with.
        anima = exact == "cosmos-predict2" and hasattr(transformer, "llm_adapter")
        return "anima" if anima else exact

    def positions(self, diffusion_model, x: torch.Tensor, size: Size) -> dict:
        grid = x.new_empty(1, 1, *size, 1)
        rope = diffusion_model.pos_embedder(grid, fps=None, device=x.device)
        return {"rope_emb": rope.unsqueeze(1).unsqueeze(0)}

    def differentiable(self, module: torch.nn.Module, original: Callable) -> Callable:
        from comfy.ldm.cosmos import predict2

        if hasattr(predict2, "apply_rotary_pos_emb"):
            # An older ComfyUI rotates by torch's own operators.
            return original

        def forward(x, *arguments, **named):
            given = self._given(arguments, named)
            rope = given.pop("rope_emb", None)
            if rope is None or not torch.is_grad_enabled():
                return original(x, *arguments, **named)
            # Norms and rotation are one kernel without a backward pass; without positions the
            # module takes the norms alone.
            q, k, v = module.compute_qkv(x, **given)
            options = given.get("transformer_options") or {}
            q, k = (_rotated(each, rope) for each in (q, k))
            return module.compute_attention(q, k, v, transformer_options=options)

        return forward

    def text_shape(self, diffusion_model: torch.nn.Module) -> Size:
        return _T5_TOKENS, diffusion_model.blocks[0].cross_attn.context_dim


def _rotated(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """x [B, N, heads, d] turned by rope [1, N, 1, d/2, 2, 2]; a pair's parts are in either half."""
    pairs = torch.stack(x.float().chunk(2, dim=-1), dim=-1)
    turned = torch.einsum("...ij,...j->...i", rope.float().expand(*pairs.shape, 2), pairs)
    return torch.cat(turned.unbind(-1), dim=-1).to(x.dtype)
