"""UNets: SD1.x, SD2.x, SDXL, SVD and what shares their classes. Sites are `….attn1`."""

from collections.abc import Callable, Mapping

import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv.families import resolution_level
from ....deltaconv.flops import halved
from ....deltaconv.locality.attention import ValueMap
from .base import (
    GIVEN,
    OTHERS,
    Inspect,
    ModelSites,
    OnMap,
    Projections,
    Site,
    SiteCall,
    Size,
    exact_family,
    intercepting,
    parameter_count,
)

# What one prompt is long, unless it is longer.
_CLIP_TOKENS = 77
_NO_SHAPE = (0, 0, 0, 0)


class UNetSites(ModelSites):
    """Sites of ComfyUI's `UNetModel`: attn1(x, context, value, mask, transformer_options).

    Maps are the latent, halved once a level; their size stands in the options as
    `activations_shape` [B, C, H, W].
    """

    @classmethod
    def of(cls, model: ModelPatcher) -> "UNetSites | None":
        """See `ModelSites.of`. Raises ValueError for a UNet without self-attention."""
        from comfy.ldm.modules.attention import BasicTransformerBlock
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        unet = model.model.diffusion_model
        if not isinstance(unet, UNetModel):
            return None
        sites = {}
        for name, module in unet.named_modules():
            # Video models attend over time in their time_stack; that is no map.
            if not isinstance(module, BasicTransformerBlock) or ".time_stack." in name:
                continue
            if module.disable_self_attn:
                continue
            path, attention = f"{name}.attn1", module.attn1
            level = resolution_level(path, unet.num_res_blocks)
            dim = attention.to_q.in_features
            sites[path] = Site(path, dim, level, parameter_count(attention))
        if not sites:
            raise ValueError("Expected a UNet with self-attention layers, got one without any.")
        family = exact_family(model, {path: site.dim for path, site in sites.items()})
        config = model.model.model_config.unet_config
        # The same layers, told apart by what else the model has.
        if family == "sd1" and config.get("use_temporal_attention"):
            family = "svd"
        elif family == "sd1" and config.get("context_dim") == 1024:
            family = "sd2"
        return cls(family, sites)

    def map_size(self, path: str, height: int, width: int) -> Size:
        level = self.sites[path].level
        return halved(height, level), halved(width, level)

    def wrap(self, site: Site, original: Callable, on_map: OnMap) -> Callable:
        def forward(x, *arguments, **named):
            context, value, mask, options = _read(*arguments, **named)
            batch, _, *size = options.get("activations_shape", _NO_SHAPE)
            own = (context is None or context is x) and (value is None or value is x)

            def attend():
                # As it was called: a module that another node put here need not know every one.
                return original(x, *arguments, **named)

            problem = "" if own and mask is None else OTHERS
            return on_map(SiteCall(x, batch, tuple(size), attend, problem))

        return forward

    def inspecting(self, site: Site, module, original: Callable, inspect: Inspect) -> Callable:
        def forward(x, context=None, value=None, mask=None, transformer_options=None):
            options = {} if transformer_options is None else transformer_options
            size = tuple(options.get("activations_shape", _NO_SHAPE)[-2:])
            problem = "" if mask is None else GIVEN
            # The override reaches this attention alone: attn2 gets the options without it.
            options = intercepting(options, size, problem, inspect)
            return original(x, context=context, value=value, mask=mask, transformer_options=options)

        return forward

    def example_call(
        self, diffusion_model, site: Site, x: torch.Tensor, latent_size: Size, options: Mapping
    ) -> dict[str, object]:
        rows, columns = self.map_size(site.path, *latent_size)
        own = {**options, "activations_shape": [len(x), 0, rows, columns]}
        return {"transformer_options": own}

    def values(self, module, affine) -> ValueMap | None:
        return ValueMap(affine(module.to_v), module.heads)

    def projections(self, module) -> Projections | None:
        same = module.to_q.in_features == module.to_q.out_features
        return Projections(module.to_q, module.to_k, module.to_v, module.heads) if same else None

    def after_residual(self, site: Site) -> str:
        return site.path.removesuffix("attn1") + "norm2"

    def recomputable(self, diffusion_model: torch.nn.Module) -> list[str]:
        names = {"ResBlock", "SpatialTransformer"}
        modules = diffusion_model.named_modules()
        return [path for path, module in modules if type(module).__name__ in names]

    def text_shape(self, diffusion_model: torch.nn.Module) -> Size:
        """See `ModelSites.text_shape`. Raises ValueError for a model that reads no prompt."""
        from comfy.ldm.modules.attention import BasicTransformerBlock

        for module in diffusion_model.modules():
            if isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
                return _CLIP_TOKENS, module.attn2.to_k.in_features
        raise ValueError("Expected a model that reads a prompt, got one without cross-attention.")

    def is_taken(self, path: str, transformer_options: Mapping) -> bool:
        """Whether a replacement is looked up in place of attn1, by block or by transformer."""
        taken = transformer_options.get("patches_replace", {}).get("attn1", {})
        parts = path.split(".")
        block = ("middle", 0)
        if parts[0] != "middle_block":
            block = (parts[0].removesuffix("_blocks"), int(parts[1]))
        return block in taken or (*block, int(parts[-2])) in taken


def _read(context=None, value=None, mask=None, transformer_options=None):
    """What attn1 is called with after x, by name or place."""
    return context, value, mask, {} if transformer_options is None else transformer_options
