"""The pyramid in the published style: one kernel per step, at the fastest of its tiles."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..kernels.reference import apply_gate, pooled_size
from ..kernels.timing import captured, interleaved, synchronize
from .published_kernels import TILES, Tile, depthwise

# Per tile, interleaved; medians are compared.
REPEATS = 5


class Choice(NamedTuple):
    """The tile chosen for a shape, median seconds of all, reasons of those that failed."""

    tile: Tile
    seconds: dict[str, float]
    failed: dict[str, str]


_chosen: dict[tuple, Choice] = {}


def choose(x: torch.Tensor, weight: torch.Tensor) -> Choice:
    """The fastest tile for x [B, H, W, h] and weight [k, k, h], timed once per shape and device.

    On a CPU, where Triton only interprets, the first tile, untimed. If no tile runs, raises what
    the first one raised.
    """
    key = (x.device, x.dtype, tuple(x.shape), tuple(weight.shape))
    if key not in _chosen:
        timed = x.device.type != "cpu"
        _chosen[key] = _fastest(x.contiguous(), weight) if timed else Choice(TILES[0], {}, {})
    return _chosen[key]


def _fastest(x: torch.Tensor, weight: torch.Tensor) -> Choice:
    calls, failed, problems, out = {}, {}, [], torch.empty_like(x)
    for tile in TILES:

        def call(tile=tile):
            depthwise(x, weight, tile, out)

        try:
            call()
            synchronize(x.device)
            # On small maps the host takes longer than any tile: compare device time.
            calls[tile] = captured(call, x.device) if x.device.type == "cuda" else call
        except Exception as problem:
            # Compilers and drivers raise different errors for a tile that is too large.
            failed[str(tile)] = f"{type(problem).__name__}: {problem}".split("\n")[0]
            problems.append(problem)
    if not calls:
        raise problems[0]
    timings = interleaved(calls, x.device, REPEATS)
    seconds = {tile: timing["median"] for tile, timing in timings.items()}
    best = min(seconds, key=seconds.get)
    return Choice(best, {str(tile): median for tile, median in seconds.items()}, failed)


def _levels(u: torch.Tensor, scales: Sequence[float]):
    """u [B, H, W, h] → (scale, u at that scale), each [B, rows, columns, h]."""
    for scale in scales:
        v = u
        if scale != 1:
            size = pooled_size(*u.shape[1:3], scale)
            v = F.adaptive_avg_pool2d(u.movedim(-1, 1), size).movedim(1, -1)
        yield scale, v


def tune(u: torch.Tensor, weights: Sequence[torch.Tensor], scales) -> list[dict]:
    """The choice for every level of u [B, H, W, h], ready for JSON."""
    found = []
    for (_, v), weight in zip(_levels(u, scales), weights, strict=True):
        tile, seconds, failed = choose(v, weight)
        about = {"map": list(v.shape), "kernel_size": weight.shape[0], "tile": str(tile)}
        found.append(about | {"seconds": seconds, "failed": failed})
    return found


def gated_pyramid(u: torch.Tensor, weights, scales, gate: str) -> torch.Tensor:
    """u [B, H, W, h] → [B, H, W, S · h/2]; see `gated_pyramid_definition`."""
    size = tuple(u.shape[1:3])
    pyramid = []
    for (scale, v), weight in zip(_levels(u, scales), weights, strict=True):
        v = apply_gate(depthwise(v, weight, choose(v, weight).tile).movedim(-1, 1), gate)
        if scale != 1:
            v = F.interpolate(v, size, mode="bilinear", align_corners=False)
        pyramid.append(v.movedim(1, -1))
    return torch.cat(pyramid, dim=-1)
