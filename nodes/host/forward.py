"""The forwards that stand in for self-attention, in the signatures of the modules they replace.

They hold their block weakly. A forward stays on the model object until the next clone is loaded;
were it to own the block, ComfyUI would report a memory leak once the patched clone is gone.
"""

import math
from collections.abc import Callable
from weakref import ReferenceType

import torch

from ...deltaconv import DeltaConvBlock
from .application import Application
from .sites import Site

Block = ReferenceType[DeltaConvBlock]


def unet_forward(
    site: Site, block: Block, original: Callable, application: Application
) -> Callable:
    """Forward of a UNet's attn1: x [B, N, C] → [B, N, C], by `block` where x is a whole map.

    Where another node tiles, merges or exchanges tokens, or brings keys and values of its own, the
    block has no map to work on: plain attention runs, and one warning says so.
    """

    def forward(x, *arguments, **named):
        context, value, mask, options = _unet_arguments(*arguments, **named)

        def attend():
            # As it was called: a module that another node put here need not know every argument.
            return original(x, *arguments, **named)

        if application.acts and (convolution := block()):
            batch, _, height, width = options.get("activations_shape", (0, 0, 0, 0))
            own = (context is None or context is x) and (value is None or value is x)
            if own and mask is None and x.shape == (batch, height * width, site.dim):
                return application.compute(site, convolution, x, (height, width), attend)
            expected = (batch, height * width, site.dim)
            application.say_once("map", _no_map(site, x, expected, own and mask is None))
        return attend()

    return forward


def pixart_forward(
    site: Site,
    block: Block,
    original: Callable,
    application: Application,
    patch_size: int,
) -> Callable:
    """Forward of PixArt's attn: x [B, N, C] → [B, N, C]; HW is the size of the latent."""

    def forward(x, *arguments, **named):
        mask, HW = _pixart_arguments(*arguments, **named)

        def attend():
            return original(x, *arguments, **named)

        if application.acts and (convolution := block()):
            # Without HW the module itself takes the map to be square.
            side = math.isqrt(x.shape[1])
            height, width = (size // patch_size for size in HW) if HW else (side, side)
            expected = (x.shape[0], height * width, site.dim)
            if mask is None and x.shape == expected:
                return application.compute(site, convolution, x, (height, width), attend)
            application.say_once("map", _no_map(site, x, expected, mask is None))
        return attend()

    return forward


def _unet_arguments(context=None, value=None, mask=None, transformer_options=None):
    """What a UNet's attn1 is called with after x, by name or place."""
    return context, value, mask, {} if transformer_options is None else transformer_options


def _pixart_arguments(mask=None, HW=None, block_id=None):
    """What of PixArt's attn arguments after x matters to a block, by name or place."""
    return mask, HW


def _no_map(site: Site, x: torch.Tensor, expected: tuple[int, ...], own: bool) -> str:
    got = f"tokens of shape {list(x.shape)}" if own else "keys, values or a mask of another node"
    return (
        f"ΔConv: expected the whole map {list(expected)} at {site.path}, got {got}. Plain "
        "attention runs where that is so; remove HyperTile, ToMe or the like to use ΔConvBlocks "
        "everywhere."
    )
