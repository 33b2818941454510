"""Depthwise kernels in the style of the authors' two, reimplemented, with the tiles they tune over.

Both load every tap of every position from global memory under a mask and accumulate in fp32. The
first takes a square of the map and multiplies in fp32; the later one takes positions in reading
order and multiplies in the map's dtype.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def _convolve(
    x,
    weight,
    out,
    row,
    column,
    height,
    width,
    channels,
    K: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """The sums of `row`, `column` [POSITIONS] over all taps; NARROW products keep x's dtype."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(2).to(tl.int64) * height * width * channels
    inside = channel < channels
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for tap in range(K * K):
        y, z = row + tap // K - K // 2, column + tap % K - K // 2
        there = (y >= 0) & (y < height) & (z >= 0) & (z < width)
        source = x + image + (y * width + z).to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(source, mask=there[:, None] & inside[None, :], other=0.0)
        factor = tl.load(weight + tap * channels + channel, mask=inside, other=0.0)
        if NARROW:
            total += (value * factor[None, :]).to(tl.float32)
        else:
            total += value.to(tl.float32) * factor.to(tl.float32)[None, :]
    position = (row * width + column).to(tl.int64)
    target = out + image + position[:, None] * channels + channel[None, :]
    mask = ((row < height) & (column < width))[:, None] & inside[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width"])
def square_kernel(
    x,
    weight,
    out,
    height,
    width,
    channels,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x [B, H, W, h], weight [K, K, h] → out [B, H, W, h], zero padding; fp32 products."""
    across = tl.cdiv(width, COLUMNS)
    position = tl.arange(0, ROWS * COLUMNS)
    row = tl.program_id(0) // across * ROWS + position // COLUMNS
    column = tl.program_id(0) % across * COLUMNS + position % COLUMNS
    _convolve(
        x, weight, out, row, column, height, width, channels, K, ROWS * COLUMNS, CHANNELS, False
    )


@triton.jit(do_not_specialize=["height", "width"])
def line_kernel(
    x,
    weight,
    out,
    height,
    width,
    channels,
    K: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x [B, H, W, h], weight [K, K, h] → out [B, H, W, h], zero padding; products in x's dtype."""
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    row, column = position // width, position % width
    _convolve(x, weight, out, row, column, height, width, channels, K, POSITIONS, CHANNELS, True)


class Tile(NamedTuple):
    """What one program computes: a square of rows × columns, or that many positions in a line."""

    positions: tuple[int, ...]
    channels: int

    def __str__(self) -> str:
        return " × ".join(map(str, (*self.positions, self.channels)))

    @property
    def narrow(self) -> bool:
        """Whether products keep the map's dtype, as in the later kernel."""
        return len(self.positions) == 1

    @property
    def warps(self) -> int:
        """64 sums per thread, which leaves registers free; the authors' number is not known."""
        sums = self.channels
        for size in self.positions:
            sums *= size
        return min(16, max(4, sums // 2048))


SQUARES = (
    Tile((8, 8), 128),
    Tile((16, 16), 64),
    Tile((8, 8), 256),
    Tile((32, 32), 32),
)
LINES = tuple(Tile((size,), channels) for size in (128, 256) for channels in (32, 64, 128))
TILES = SQUARES + LINES


class Launch(NamedTuple):
    """One kernel at one shape; `kernels.compile_ahead` compiles it too."""

    kernel: triton.JITFunction
    grid: tuple[int, int, int]
    tensors: tuple[str, ...]
    numbers: dict[str, int]
    constants: dict[str, int]
    options: dict[str, int]


@lru_cache(maxsize=4096)
def plan(shape: tuple[int, ...], size: int, tile: Tile) -> Launch:
    """The launch for x of `shape` [B, H, W, h] and a kernel of that size."""
    batch, height, width, channels = shape
    constants = {"K": size}
    if tile.narrow:
        (positions,) = tile.positions
        programs = triton.cdiv(height * width, positions)
        constants["POSITIONS"] = positions
    else:
        rows, columns = tile.positions
        programs = triton.cdiv(height, rows) * triton.cdiv(width, columns)
        constants |= {"ROWS": rows, "COLUMNS": columns}
    return Launch(
        line_kernel if tile.narrow else square_kernel,
        (programs, triton.cdiv(channels, tile.channels), batch),
        ("x", "weight", "out"),
        {"height": height, "width": width, "channels": channels},
        {**constants, "CHANNELS": tile.channels},
        {"num_warps": tile.warps},
    )


def depthwise(
    x: torch.Tensor, weight: torch.Tensor, tile: Tile, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [B, H, W, h], weight [k, k, h] → [B, H, W, h], `out` where one is given."""
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    launch = plan(tuple(x.shape), weight.shape[0], tile)
    named = launch.numbers | launch.constants | launch.options
    launch.kernel[launch.grid](x=x, weight=weight, out=out, **named)
    return out
