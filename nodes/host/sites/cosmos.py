"""Anima and Cosmos-Predict2, text to image. Sites are `blocks.{i}.self_attn`."""

from collections.abc import Callable, Mapping

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....deltaconv.locality.attention import QKVMaps
from .base import (
    OTHERS,
    Inspect,
    ModelSites,
    OnMap,
    Site,
    SiteCall,
    Size,
    exact_family,
    intercepting,
    parameter_count,
)

# What a prompt is padded to.
_T5_TOKENS = 512
# Entry in the transformer options: frames, rows and columns of tokens.
_GRID = "deltaconv_grid"


class CosmosSites(ModelSites):
    """Sites of ComfyUI's `MiniTrainDIT`: self_attn(x, context, rope_emb, transformer_options).

    Latents are [B, C, T, H, W], padded to whole tokens of `latent_step` cells; a block computes
    images, T = 1. The model tells its attention no size, so a wrapper around it does. The text
    modules of Anima's `llm_adapter` are no sites.
    """

    @classmethod
    def of(cls, model: ModelPatcher) -> "CosmosSites | None":
        from comfy.ldm.cosmos.predict2 import MiniTrainDIT

        transformer = model.model.diffusion_model
        if not isinstance(transformer, MiniTrainDIT):
            return None
        sites = {}
        for index, block in enumerate(transformer.blocks):
            path, attention = f"blocks.{index}.self_attn", block.self_attn
            sites[path] = Site(path, attention.query_dim, 0, parameter_count(attention))
        family = exact_family(model, {path: site.dim for path, site in sites.items()})
        # The same layers, told apart by what else they were loaded with.
        if family == "cosmos-predict2" and hasattr(transformer, "llm_adapter"):
            family = "anima"
        return cls(family, sites, transformer.patch_spatial)

    def map_size(self, path: str, height: int, width: int) -> Size:
        return -(-height // self.latent_step), -(-width // self.latent_step)

    def wrap(self, site: Site, original: Callable, on_map: OnMap) -> Callable:
        def forward(x, *arguments, **named):
            context, options = _read(*arguments, **named)
            frames, *size = options.get(_GRID, (0, 0, 0))

            def attend():
                return original(x, *arguments, **named)

            problem = "" if context is None or context is x else OTHERS
            if frames != 1:
                problem = _no_image(frames)
            return on_map(SiteCall(x, x.shape[0], tuple(size), attend, problem))

        return forward

    def inspecting(self, site: Site, module, original: Callable, inspect: Inspect) -> Callable:
        def forward(x, context=None, rope_emb=None, transformer_options=None):
            options = {} if transformer_options is None else transformer_options
            frames, *size = options.get(_GRID, (0, 0, 0))
            problem = "" if frames == 1 else f"it sees {_no_image(frames)}"
            options = intercepting(options, tuple(size), problem, inspect)
            return original(x, context, rope_emb=rope_emb, transformer_options=options)

        return forward

    def example_call(
        self, site: Site, batch: int, latent_size: Size, options: Mapping
    ) -> dict[str, object]:
        own = {**options, _GRID: (1, *self.map_size(site.path, *latent_size))}
        return {"transformer_options": own}

    def projections(self, module, affine) -> QKVMaps | None:
        # Norms and rotary positions lie between these maps and what attention compares.
        return None

    def after_residual(self, site: Site) -> str:
        return site.path.removesuffix("self_attn") + "layer_norm_cross_attn"

    def recomputable(self, diffusion_model: torch.nn.Module) -> list[str]:
        return [f"blocks.{index}" for index in range(len(diffusion_model.blocks))]

    def text_shape(self, diffusion_model: torch.nn.Module) -> Size:
        return _T5_TOKENS, diffusion_model.blocks[0].cross_attn.context_dim

    def prepare(self, patcher: ModelPatcher, key: str) -> None:
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, self._note_grid)

    def _note_grid(self, executor, x, *arguments, **named):
        """DIFFUSION_MODEL wrapper: x [B, C, T, H, W], unpadded; the options are copied."""
        frames = -(-x.shape[2] // executor.class_obj.patch_temporal)
        grid = (frames, *self.map_size("", *x.shape[-2:]))
        options = {**named.get("transformer_options", {}), _GRID: grid}
        return executor(x, *arguments, **{**named, "transformer_options": options})


def _no_image(frames: int) -> str:
    """What attention sees where it is not one image; 0 frames: nothing said how many."""
    return f"a video of {frames} frames" if frames else "tokens of an unknown map"


def _read(context=None, rope_emb=None, transformer_options=None):
    """What self_attn is called with after x, by name or place."""
    return context, {} if transformer_options is None else transformer_options
