"""HunyuanDiT. Sites are `blocks.{i}.attn1`."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....deltaconv.locality.attention import ValueMap
from .base import Heads, Inspect, OnMap, Site, Size
from .transformer import UNKNOWN, Grid, TransformerSites


class _Rope(tuple):
    """(cos, sin) [N, d] that tell the map they were made for."""

    grid: Grid = UNKNOWN


class _Noted:
    """The map that each thread's model call is of.

    A backward pass recomputes blocks in threads of its own, which the newest call is of.
    """

    def __init__(self):
        self._own, self._newest = threading.local(), UNKNOWN

    @property
    def grid(self) -> Grid:
        return getattr(self._own, "grid", self._newest)

    @grid.setter
    def grid(self, grid: Grid) -> None:
        self._own.grid = self._newest = grid


@dataclass(frozen=True)
class HunyuanDiTSites(TransformerSites):
    """Sites of ComfyUI's `HunYuanDiT`: attn1(x, freqs_cis_img) → (y,), without transformer_options.

    Nothing tells attention its map, so a wrapper around the model notes it.
    """

    ATTENTION, ARGUMENTS = "attn1", ("freqs_cis_img",)
    VALUE, FOLLOWING = "Wqkv", "norm3"

    noted: _Noted = field(default_factory=_Noted, compare=False)

    @classmethod
    def is_kind(cls, transformer: torch.nn.Module) -> bool:
        from comfy.ldm.hydit.models import HunYuanDiT

        return isinstance(transformer, HunYuanDiT)

    @classmethod
    def step(cls, transformer: torch.nn.Module) -> int:
        return transformer.patch_size

    def wrap(self, site: Site, original: Callable, on_map: OnMap) -> Callable:
        def first(x, *arguments, **named):
            return original(x, *arguments, **named)[0]

        # The module answers with a tuple of one.
        inner = super().wrap(site, first, on_map)
        return lambda x, *arguments, **named: (inner(x, *arguments, **named),)

    def inspecting(self, site: Site, module, original: Callable, inspect: Inspect) -> Callable:
        def forward(x, *arguments, **named):
            given = self._given(arguments, named)
            size, problem = self._found(x, given)
            if problem:
                found = Heads(None, None, None, size, problem=f"it sees {problem}")
            else:
                found = Heads(*_heads(module, x, given.get("freqs_cis_img")), size)
            if (result := inspect(found)) is not None:
                return (module.out_proj(result),)
            return original(x, **given)

        return forward

    def example_call(
        self, diffusion_model, site: Site, x: torch.Tensor, latent_size: Size, options: Mapping
    ) -> dict[str, object]:
        from comfy.ldm.hydit.models import calc_rope

        latent = x.new_empty(1, 1, *latent_size)
        head_size = diffusion_model.hidden_size // diffusion_model.num_heads
        rope = _Rope(calc_rope(latent, diffusion_model.patch_size, head_size))
        rope.grid = (1, *self.map_size(site.path, *latent_size))
        return {"freqs_cis_img": rope}

    def values(self, module, affine) -> ValueMap | None:
        *_, value = affine(module.Wqkv).chunk(3, dim=0)
        return ValueMap(value, module.num_heads)

    def text_shape(self, diffusion_model: torch.nn.Module) -> Size:
        return diffusion_model.text_len, diffusion_model.text_states_dim

    def prompt(self, diffusion_model: torch.nn.Module) -> list:
        clip = torch.randn(1, *self.text_shape(diffusion_model))
        second = torch.randn(1, diffusion_model.text_len_t5, diffusion_model.text_states_dim_t5)
        return [
            clip,
            {
                "attention_mask": torch.ones(clip.shape[:2]),
                "conditioning_mt5xl": second,
                "attention_mask_mt5xl": torch.ones(second.shape[:2]),
            },
        ]

    def prepare(self, patcher: ModelPatcher, key: str) -> None:
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, self._note)

    def _note(self, executor, x, *arguments, **named):
        """APPLY_MODEL wrapper: x [B, C, H, W], unpadded."""
        self.noted.grid = self.grid_of(x)
        return executor(x, *arguments, **named)

    def forget(self) -> None:
        self.noted.grid = UNKNOWN

    def grid(self, given: Mapping) -> Grid:
        rope = given.get("freqs_cis_img")
        return rope.grid if isinstance(rope, _Rope) else self.noted.grid


def _heads(module, x: torch.Tensor, rope) -> tuple[torch.Tensor, ...]:
    """x [B, N, C] → q, k, v [B, heads, N, d] as the module, which hands on no options, has them."""
    from comfy.ldm.hydit.attn_layers import apply_rotary_emb

    split = module.Wqkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = split.unbind(0)
    q, k = module.q_norm(q), module.k_norm(k)
    if rope is not None:
        q, k = apply_rotary_emb(q, k, rope, head_first=True)
    return q, k, v
