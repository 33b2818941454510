"""PixArt-α and PixArt-Σ. Sites are `blocks.{i}.attn`."""

import math
from collections.abc import Callable, Mapping

import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv.locality.attention import ValueMap
from .base import (
    OTHERS,
    Heads,
    Inspect,
    ModelSites,
    OnMap,
    Site,
    SiteCall,
    Size,
    exact_family,
    parameter_count,
)


class PixArtSites(ModelSites):
    """Sites of ComfyUI's `PixArtMS`: attn(x, mask, HW, block_id), without transformer_options.

    HW is the size of the latent; a token is `latent_step` cells wide.
    """

    @classmethod
    def of(cls, model: ModelPatcher) -> "PixArtSites | None":
        from comfy.ldm.pixart.pixartms import PixArtMS

        transformer = model.model.diffusion_model
        if not isinstance(transformer, PixArtMS):
            return None
        sites = {}
        for index, block in enumerate(transformer.blocks):
            path, attention = f"blocks.{index}.attn", block.attn
            sites[path] = Site(path, attention.proj.out_features, 0, parameter_count(attention))
        family = exact_family(model, {path: site.dim for path, site in sites.items()})
        return cls(family, sites, transformer.patch_size)

    def map_size(self, path: str, height: int, width: int) -> Size:
        return height // self.latent_step, width // self.latent_step

    def wrap(self, site: Site, original: Callable, on_map: OnMap) -> Callable:
        def forward(x, *arguments, **named):
            mask, HW = _read(*arguments, **named)

            def attend():
                return original(x, *arguments, **named)

            problem = "" if mask is None else OTHERS
            return on_map(SiteCall(x, x.shape[0], self._size(x, HW), attend, problem))

        return forward

    def inspecting(self, site: Site, module, original: Callable, inspect: Inspect) -> Callable:
        def forward(x, mask=None, HW=None, block_id=None):
            size = self._size(x, HW)
            if getattr(module, "sr_ratio", 1) > 1:
                why = "it compresses its keys, so they are not cells of this map"
                result = inspect(Heads(None, None, None, size, problem=why))
            else:
                # The module hands no options on to its attention, so q, k and v are made again.
                q, k, v = module.qkv(x).unflatten(-1, (3, -1)).unbind(2)
                heads = (module.q_norm(q), module.k_norm(k), v)
                split = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in heads)
                result = inspect(Heads(*split, size))
            if result is not None:
                return module.proj(result)
            return original(x, mask=mask, HW=HW, block_id=block_id)

        return forward

    def example_call(
        self, diffusion_model, site: Site, x: torch.Tensor, latent_size: Size, options: Mapping
    ) -> dict[str, object]:
        return {"HW": latent_size}

    def values(self, module, affine) -> ValueMap | None:
        if module.sr_ratio > 1:
            return None
        *_, value = affine(module.qkv).chunk(3, dim=0)
        return ValueMap(value, module.num_heads)

    def after_residual(self, site: Site) -> str:
        return site.path.removesuffix("attn") + "cross_attn"

    def recomputable(self, diffusion_model: torch.nn.Module) -> list[str]:
        modules = diffusion_model.named_modules()
        return [path for path, module in modules if type(module).__name__ == "PixArtMSBlock"]

    def text_shape(self, diffusion_model: torch.nn.Module) -> Size:
        return tuple(diffusion_model.y_embedder.y_embedding.shape)

    def _size(self, x: torch.Tensor, HW) -> Size:
        # Without HW the module itself takes the map to be square.
        side = math.isqrt(x.shape[1])
        return tuple(length // self.latent_step for length in HW) if HW else (side, side)


def _read(mask=None, HW=None, block_id=None):
    """What of attn's arguments after x matters to a block, by name or place."""
    return mask, HW
