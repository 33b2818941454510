"""How one shape is cut into launches: tiles, grids and the integers the kernels take."""

from functools import lru_cache
from itertools import accumulate
from math import ceil
from typing import NamedTuple

import torch

from ..gated_pyramid import pooled_size
from .correlate import gated_kernel
from .pool import pool_kernel
from .project import project_kernel
from .upsample import upsample_kernel

# About two programs for each of the 132 multiprocessors of a large GPU: with fewer, smaller tiles
# fill it better than larger ones reuse.
FEW_PROGRAMS = 264


class Shape(NamedTuple):
    """What a plan depends on: u [batch, height, width, channels], the pyramid, dtype and device."""

    batch: int
    height: int
    width: int
    channels: int
    kernel_size: int
    scales: tuple[float, ...]
    gate: str
    dtype: torch.dtype
    device: torch.device

    @property
    def half(self) -> int:
        return self.channels // 2

    @property
    def gain(self) -> float:
        """√(h/2), the factor of the `scaled` gate."""
        return self.half**0.5

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every level, the full one first."""
        return [pooled_size(self.height, self.width, scale) for scale in self.scales]

    @property
    def low_positions(self) -> int:
        """Positions of all lower levels together, over the batch."""
        return self.batch * sum(rows * columns for rows, columns in self.sizes[1:])


class Launch:
    """One kernel at one shape, called with its tensors alone.

    From the second call on the compiled kernel is called directly: the arguments that Triton
    looks at to choose it are the plan's, or aligned tensors of the plan's dtype.
    """

    def __init__(self, kernel, programs, numbers=(), constants=None, *, warps=4, stages=1):
        self.kernel, self.programs, self.numbers = kernel, programs, tuple(numbers)
        self.constants = constants or {}
        self.options = {"num_warps": warps, "num_stages": stages}
        self.tail = (*self.numbers, *self.constants.values())
        self.run = None

    def __call__(self, *tensors: torch.Tensor) -> None:
        if self.run is not None:
            self.run(*tensors, *self.tail)
            return
        grid = (self.programs, 1, 1)
        keywords = {**self.constants, **self.options}
        compiled = self.kernel[grid](*tensors, *self.numbers, **keywords)
        if compiled is not None and hasattr(compiled, "packed_metadata"):
            self.run = compiled[grid]


class Tile(NamedTuple):
    """Outputs of one program of the convolutions: rows × columns × channels."""

    rows: int
    columns: int
    channels: int

    def programs(self, batch: int, size: tuple[int, int], lanes: int) -> int:
        """Programs that cover [batch, *size, lanes]."""
        down, across = ceil(size[0] / self.rows), ceil(size[1] / self.columns)
        return batch * down * across * ceil(lanes / self.channels)

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "CHANNELS": self.channels}


def convolution_tile(batch: int, size: tuple[int, int], lanes: int) -> Tile:
    """512 positions × channels in four warps, four or eight rows of them in registers.

    32 channels are one 64-byte run in fp16; 16 where 32 would leave lanes idle (h/2 = 80).
    """
    channels = 32 if lanes % 32 == 0 else 16
    tile = Tile(8, 512 // channels, channels)
    small = tile.programs(batch, size, lanes) < FEW_PROGRAMS
    return tile._replace(rows=4) if small else tile


def padded_starts(counts: list[int], slots: int) -> list[int]:
    """First program of every role, and behind the last: `slots` + 1 running totals of counts."""
    return [0, *accumulate(counts + [0] * (slots - len(counts)))]


def levels_of(shape: Shape) -> list[int]:
    """[batch, H, W, h1, w1, h2, w2]; levels that the pyramid lacks are 1 × 1."""
    sizes = [*shape.sizes, (1, 1), (1, 1)][:3]
    return [shape.batch, *(length for size in sizes for length in size)]


class Forward(NamedTuple):
    """The launches of a forward pass; those that the call does not need are None."""

    pool: Launch | None
    convolve: Launch
    upsample: Launch | None
    project: Launch | None
    chunks: int


@lru_cache(maxsize=256)
def plan_forward(shape: Shape, dim: int | None, x_dtype: torch.dtype | None) -> Forward:
    """Shape of u, C and dtype of x → launches; without x the pyramid alone, no context.

    `x_dtype` only keeps plans apart: each holds kernels compiled for its dtypes.
    """
    batch, channels, half, levels = shape.batch, shape.channels, shape.half, len(shape.scales)
    lengths, lower = levels_of(shape), shape.sizes[1:]
    wide = dim or 1
    tokens = shape.height * shape.width

    # Sums of x: enough chunks to fill the device, none below 64 tokens.
    sums = 64
    wanted = ceil(512 / (batch * ceil(wide / sums)))
    chunk = 32 * ceil(max(64, tokens / wanted) / 32)
    chunks = ceil(tokens / chunk)
    context_programs = batch * ceil(wide / sums) if dim else 0

    pool = None
    if lower or dim:
        counts = [batch * rows * ceil(cols / 16) * ceil(channels / 64) for rows, cols in lower]
        _, second, mean = padded_starts(counts, 2)
        numbers = (*lengths, second, mean, channels, wide, chunk, chunks)
        constants = {"LEVELS": levels, "COLUMNS": 16, "CHANNELS": 64, "TOKENS": 32, "SUMS": sums}
        pool = Launch(pool_kernel, mean + context_programs * chunks, numbers, constants)

    tile = convolution_tile(batch, shape.sizes[0], half)
    counts = [tile.programs(batch, size, half) for size in shape.sizes]
    _, *first, mean = padded_starts(counts, 3)
    numbers = (*lengths, *first, mean, channels, half, wide, chunks, shape.kernel_size, shape.gain)
    constants = {"LEVELS": levels, "SIGMOID": shape.gate == "sigmoid", "K": shape.kernel_size}
    constants |= tile.constants | {"SUMS": sums}
    convolve = Launch(gated_kernel, mean + context_programs, numbers, constants)

    upsample = None
    if lower or dim:
        block, outputs = min(32, tile.channels), 8
        lines = batch * shape.height * ceil(shape.width / 32) * ceil(half / block)
        context = lines * len(lower)
        numbers = (*lengths, lines, context, half, wide)
        constants = {"LEVELS": levels, "COLUMNS": 32, "CHANNELS": block}
        constants |= {"OUTPUTS": outputs, "INPUTS": 256}
        programs = context + (batch * ceil(dim / outputs) if dim else 0)
        upsample = Launch(upsample_kernel, programs, numbers, constants)

    product = None
    # Triton's product is for the tensor cores; in fp32 the vendor's library is the better one.
    if dim and shape.dtype in (torch.float16, torch.bfloat16):
        product = plan_projection(batch, tokens, half * levels, dim)
    return Forward(pool, convolve, upsample, product, chunks)


def plan_projection(batch: int, tokens: int, inner: int, dim: int) -> Launch:
    """[batch, tokens, inner] · [inner, dim] → a launch that holds at most 48 KiB shared memory."""
    token_block, output_block = 128, 64
    if batch * ceil(tokens / 128) * ceil(dim / 64) < FEW_PROGRAMS:
        token_block = 64
    elif dim % 128 == 0 and batch * ceil(tokens / 128) * (dim // 128) >= FEW_PROGRAMS:
        output_block = 128
    # Three stages of 16-bit tiles: (128 + 128) · 32 · 2 B · 3 = 48 KiB.
    constants = {"EVEN": inner % 32 == 0, "TOKENS": token_block, "OUTPUTS": output_block}
    programs = batch * ceil(tokens / token_block) * ceil(dim / output_block)
    warps = 8 if output_block == 128 else 4
    numbers, constants = (tokens, inner, dim), constants | {"INNER": 32}
    return Launch(project_kernel, programs, numbers, constants, warps=warps, stages=3)
