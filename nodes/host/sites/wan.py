"""Wan 2.1 and 2.2 with one frame. Sites are `blocks.{i}.self_attn`."""

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher

from .base import Site, Size
from .transformer import UNKNOWN, Grid, TransformerSites

# The model's own entry in the transformer options: frames, rows and columns of tokens.
_OWN_GRID = "grid_sizes"


class WanSites(TransformerSites):
    """Sites of ComfyUI's `WanModel`: self_attn(x, freqs, transformer_options).

    The models for control, animation, sound and the like are subclasses that bring tokens and maps
    of their own; they are of another kind.
    """

    ARGUMENTS = ("freqs", "transformer_options")
    VALUE, FOLLOWING = "v", "norm3"

    @classmethod
    def is_kind(cls, transformer: torch.nn.Module) -> bool:
        from comfy.ldm.wan.model import WanModel

        return type(transformer) is WanModel

    def grid(self, given: Mapping) -> Grid:
        return tuple((given.get("transformer_options") or {}).get(_OWN_GRID, UNKNOWN))

    def positions(self, diffusion_model, x: torch.Tensor, size: Size) -> dict:
        cells = (side * self.latent_step for side in size)
        return {"freqs": diffusion_model.rope_encode(1, *cells, device=x.device, dtype=x.dtype)}

    def example_call(
        self, diffusion_model, site: Site, x: torch.Tensor, latent_size: Size, options: Mapping
    ) -> dict[str, object]:
        given = super().example_call(diffusion_model, site, x, latent_size, options)
        own = {_OWN_GRID: (1, *self.map_size(site.path, *latent_size))}
        return {**given, "transformer_options": {**options, **own}}

    def text_shape(self, diffusion_model: torch.nn.Module) -> Size:
        return diffusion_model.text_len, diffusion_model.text_dim

    def prepare(self, patcher: ModelPatcher, key: str) -> None:
        """Nothing to add: the model tells its attention the map."""
