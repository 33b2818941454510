"""Checks a contender at the shape at which it is to be timed.

Small maps are compared with float64 everywhere, larger ones in windows: at the corners, where tiles
and index ranges end, and in the middle. Between the windows every tile of a block's map, and every
gradient, is compared with torch's operators in the same dtype; the errors of both against float64
on a small map say how much two correct results may differ.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..kernels.accuracy import NAMES, Error, distance
from .contenders import BLOCKS, Contender
from .shapes import Row, Window, side_of

# Maps up to this side are compared everywhere, larger ones in windows of this width.
WHOLE, WINDOW = 32, 16
# Tiles of a map between the windows, and how many tokens are compared at a time.
TILE, CHUNK = 16, 2**16
# A side at which a gradient in float64 is quick.
SMALL_SIDE = 20
# Two correct results may differ, per tile or tensor, by this multiple of their errors.
FACTOR = 8


def random_input(
    row: Row, batch: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> torch.Tensor:
    """x [batch, tokens, C], standard normal as after a norm."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, row.tokens, row.dim)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def windows(side: int) -> list[Window]:
    """The windows of a map of that side that are compared with float64."""
    # Half-resolution cells of an odd map straddle any crop.
    if side <= WHOLE or side % 2:
        return [Window(0, 0, side)]
    far = side - WINDOW
    middle = far // 4 * 2
    places = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    return [Window(top, left, WINDOW) for top, left in places]


@torch.no_grad()
def forward_error(contender: Contender, x: torch.Tensor, value: torch.Tensor) -> Error:
    """Distance of value = run(x) [B, N, C] from float64 in all windows."""
    places = windows(side_of(x))
    found = torch.cat([place.of(value).cpu() for place in places], 1)
    return distance(found, torch.cat([contender.at(x, place).cpu() for place in places], 1))


@torch.no_grad()
def tiles_apart(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Maps [B, N, C] → root mean square difference of the worst tile, over that of reference."""
    difference, size = [], 0.0
    for a, b in zip(value.split(CHUNK, 1), reference.split(CHUNK, 1), strict=True):
        difference.append((a.float() - b.float()).square().mean(-1))
        size += b.float().square().mean(-1).sum(dtype=torch.float64).item()
    side = side_of(value)
    tiles = torch.cat(difference, 1).view(-1, 1, side, side)
    worst = F.avg_pool2d(tiles, min(TILE, side), ceil_mode=True).max().item()
    return (worst / max(size / value[..., 0].numel(), torch.finfo().tiny)) ** 0.5


def forward_problem(
    name: str,
    error: Error,
    own: Error | None,
    dtype: torch.dtype,
    apart: float | None = None,
) -> str | None:
    """What is wrong with a result, or None.

    `error` and torch's `own` are against float64, `apart` is the difference between the two
    (`tiles_apart`). Comparisons are written so that NaN fails.
    """
    # What is not a block has no second implementation to compare with.
    right = error.worst <= 32 * torch.finfo(dtype).eps
    if name in BLOCKS and own is not None:
        right = right and error.within(own, dtype)
    if not right:
        return f"WRONG RESULT, not timed: {error}, torch's own {own}"
    allowed = FACTOR * (error.rms + own.rms) if own is not None else None
    if apart is not None and not apart <= allowed:
        return f"WRONG RESULT, not timed: a tile is {apart:.1e} off torch's, allowed {allowed:.1e}"
    return None


def gradients(contender: Contender, x: torch.Tensor, upstream: torch.Tensor) -> Sequence:
    """Gradients of x and of every weight."""
    x = x.detach().requires_grad_()
    tensors = [x, *(tensor.requires_grad_() for tensor in contender.tensors)]
    return torch.autograd.grad(contender.run(x), tensors, upstream)


def gradient_errors(
    make, row: Row, batch: int, dtype: torch.dtype, device: torch.device
) -> list[Error]:
    """Every gradient's error against float64, of what `make` builds, on a small map."""
    row = row._replace(side=min(row.side, SMALL_SIDE))
    contender = make(row, dtype, device)
    x = random_input(row, batch, dtype, device)
    upstream = random_input(row, batch, dtype, device, seed=1)
    found = gradients(contender, x, upstream)
    owned = [tensor.requires_grad_() for tensor in contender.exact_tensors]
    wide = [tensor.to(owned[0]) for tensor in (x, upstream)]
    exact = torch.autograd.grad(
        contender.exact(wide[0].requires_grad_()), [wide[0], *owned], wide[1]
    )
    return [distance(a, b.cpu()) for a, b in zip(found, exact, strict=True)]


def gradient_problem(
    errors: Sequence[Error],
    own: Sequence[Error],
    found: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> str | None:
    """Which gradient is wrong, or None.

    `errors` and torch's `own` come from a small map, `found` and torch's `reference` from the timed
    one.
    """
    unit = torch.finfo(dtype).eps
    names = ["x", "up_weight", "up_bias", *NAMES[2:]]
    names += [f"kernel {level}" for level in range(len(found) - len(names))]
    for name, error, mine, a, b in zip(names, errors, own, found, reference, strict=True):
        small = error.rms <= 4 * mine.rms + unit and error.worst <= 4 * mine.worst + unit
        if not small:
            return f"WRONG GRADIENT of {name}, not timed: {error}, torch's own {mine}"
        if name == "x":
            apart = tiles_apart(a, b)
        else:
            b = b.double()
            apart = ((a.double() - b).norm() / b.norm().clamp_min(torch.finfo().tiny)).item()
        allowed = FACTOR * (error.rms + mine.rms + unit)
        if not apart <= allowed:
            return (
                f"WRONG GRADIENT of {name}, not timed: {apart:.1e} off torch's, "
                f"allowed {allowed:.1e}"
            )
    return None
