"""What transformers over one map of image tokens share; each kind is a subclass in its own file."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....deltaconv.locality.attention import ValueMap
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

# Entry in the transformer options: frames, rows and columns of tokens.
GRID = "deltaconv_grid"
# Frames, rows and columns; 0 frames: nothing says how many.
Grid = tuple[int, int, int]
UNKNOWN: Grid = (0, 0, 0)
# ComfyUI calls a guider's second model with the first one's wrappers.
_UNKNOWN_MAP = "tokens of an unknown map, as in the second model of Dual Model CFG Guider"


class TransformerSites(ModelSites):
    """Sites of a transformer, one per block, called as attention(x [B, T·H·W, C], …).

    Latents are padded to whole tokens of `latent_step` cells; a block computes images, T = 1. The
    models tell their attention no size, so a DIFFUSION_MODEL wrapper puts it into the options.
    Tokens beside the map, of reference images or guides, leave plain attention in place.
    """

    # The list of blocks, the attention in each, and its parameters behind x, in order.
    BLOCKS: ClassVar[str] = "blocks"
    ATTENTION: ClassVar[str] = "self_attn"
    ARGUMENTS: ClassVar[tuple[str, ...]]
    # In the attention: its value layer, its number of heads.
    VALUE: ClassVar[str]
    HEADS: ClassVar[str] = "num_heads"
    # In a block: the module that reads the hidden state after the residual add.
    FOLLOWING: ClassVar[str]

    @classmethod
    def of(cls, model: ModelPatcher) -> "TransformerSites | None":
        transformer = model.model.diffusion_model
        if not cls.is_kind(transformer):
            return None
        sites = {}
        for index, block in enumerate(getattr(transformer, cls.BLOCKS)):
            path = f"{cls.BLOCKS}.{index}.{cls.ATTENTION}"
            attention = getattr(block, cls.ATTENTION)
            sites[path] = Site(path, cls.channels(attention), 0, parameter_count(attention))
        dims = {path: site.dim for path, site in sites.items()}
        family = cls.family_of(transformer, exact_family(model, dims))
        return cls(family, sites, cls.step(transformer))

    @classmethod
    @abstractmethod
    def is_kind(cls, transformer: torch.nn.Module) -> bool:
        """Whether the diffusion model is of ComfyUI's class for this kind."""

    @classmethod
    def channels(cls, attention: torch.nn.Module) -> int:
        """Channels C of an attention's input."""
        return getattr(attention, cls.VALUE).in_features

    @classmethod
    def step(cls, transformer: torch.nn.Module) -> int:
        """Latent cells along a token."""
        return transformer.patch_size[-1]

    @classmethod
    def family_of(cls, transformer: torch.nn.Module, exact: str) -> str:
        """The family where others have the same layers; `exact` is the one found by these."""
        return exact

    def grid(self, given: Mapping) -> Grid:
        """Frames, rows and columns of the map that a call's arguments tell."""
        return tuple((given.get("transformer_options") or {}).get(GRID, UNKNOWN))

    def beside(self, given: Mapping) -> str:
        """What a call's arguments bring that a block cannot compute; "" for nothing."""
        patches = (given.get("transformer_options") or {}).get("patches", {})
        return OTHERS if patches.get("attn1_patch") else ""

    def positions(self, diffusion_model: torch.nn.Module, x: torch.Tensor, size: Size) -> dict:
        """The rotary positions of a map, by the name under which the attention takes them."""
        return {}

    def map_size(self, path: str, height: int, width: int) -> Size:
        return -(-height // self.latent_step), -(-width // self.latent_step)

    def wrap(self, site: Site, original: Callable, on_map: OnMap) -> Callable:
        def forward(x, *arguments, **named):
            size, problem = self._found(x, self._given(arguments, named))

            def attend():
                # As it was called: a module that another node put here need not know every name.
                return original(x, *arguments, **named)

            return on_map(SiteCall(x, x.shape[0], size, attend, problem))

        return forward

    def inspecting(self, site: Site, module, original: Callable, inspect: Inspect) -> Callable:
        def forward(x, *arguments, **named):
            given = self._given(arguments, named)
            size, problem = self._found(x, given)
            if problem == OTHERS:
                # What it brings shows in q and k.
                problem = ""
            options = given.get("transformer_options") or {}
            given["transformer_options"] = intercepting(
                options, size, problem and f"it sees {problem}", inspect
            )
            return original(x, **given)

        return forward

    def example_call(
        self, diffusion_model, site: Site, x: torch.Tensor, latent_size: Size, options: Mapping
    ) -> dict[str, object]:
        size = self.map_size(site.path, *latent_size)
        own = {"transformer_options": {**options, GRID: (1, *size)}}
        return {**own, **self.positions(diffusion_model, x, size)}

    def values(self, module, affine) -> ValueMap | None:
        return ValueMap(affine(getattr(module, self.VALUE)), getattr(module, self.HEADS))

    def after_residual(self, site: Site) -> str:
        return site.path.removesuffix(self.ATTENTION) + self.FOLLOWING

    def recomputable(self, diffusion_model: torch.nn.Module) -> list[str]:
        blocks = getattr(diffusion_model, self.BLOCKS)
        return [f"{self.BLOCKS}.{index}" for index in range(len(blocks))]

    def prepare(self, patcher: ModelPatcher, key: str) -> None:
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, self.note_grid)

    def note_grid(self, executor, x, *arguments, **named):
        """DIFFUSION_MODEL wrapper: x [B, C, (T,) H, W], unpadded; the options are copied."""
        options = {**named.get("transformer_options", {}), GRID: self.grid_of(x)}
        return executor(x, *arguments, **{**named, "transformer_options": options})

    def grid_of(self, x: torch.Tensor) -> Grid:
        """x [B, C, (T,) H, W], unpadded → frames, rows and columns of tokens."""
        return x.shape[2] if x.ndim == 5 else 1, *self.map_size("", *x.shape[-2:])

    def _given(self, arguments: tuple, named: Mapping) -> dict:
        """The arguments behind x, by name, whatever place they came in."""
        return {**dict(zip(self.ARGUMENTS, arguments, strict=False)), **named}

    def _found(self, x: torch.Tensor, given: Mapping) -> tuple[Size, str]:
        """The map of a call, and what attention sees beside it."""
        frames, rows, columns = self.grid(given)
        context = given.get("context")
        if frames != 1:
            problem = f"a video of {frames} frames" if frames else _UNKNOWN_MAP
        elif (more := x.shape[1] - rows * columns) > 0:
            problem = f"{more} tokens beside its map, of reference images or guides"
        else:
            problem = self.beside(given) if context is None or context is x else OTHERS
        return (rows, columns), problem
