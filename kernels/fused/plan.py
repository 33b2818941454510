"""How a shape becomes launches: tiles, grids and the numbers that the kernels take."""

from functools import cache, lru_cache
from math import ceil
from typing import NamedTuple

import torch

from .depthwise import gated_kernel
from .launch import Launch
from .plan_bands import plan_bands
from .pool import pool_kernel
from .project import project_kernel
from .shape import (
    SUMS,
    Forward,
    ProjectionTile,
    Shape,
    exact_span,
    levels_of,
    padded_starts,
    sums_of,
)
from .upsample import upsample_kernel
from .workspace import Tensors, arrange

# About two programs for each of an H100's 132 multiprocessors. With half as many, small tiles that
# occupy all of them beat large tiles that reuse more.
FEW_PROGRAMS = 264
# Dtypes whose products tensor cores take exactly; in fp32 the vendor's library is faster.
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


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
    """512 positions × channels in four warps, eight rows of them in registers; 256 on small maps.

    32 channels are one 64-byte run in fp16; 16 where 32 would leave lanes idle (h/2 = 80).
    """
    channels = 32 if lanes % 32 == 0 else 16
    tile = Tile(8, 512 // channels, channels)
    few = tile.programs(batch, size, lanes) < FEW_PROGRAMS // 2
    return tile._replace(columns=256 // channels) if few else tile


@lru_cache(maxsize=256)
def plan_forward(
    shape: Shape, dim: int | None, x_dtype: torch.dtype | None, shared: int | None = None
) -> Forward:
    """Shape of u, C and dtype of x → launches; without x the pyramid alone, no context.

    `x_dtype` is part of the key only: a plan holds kernels compiled for its dtypes. `shared`: bytes
    of shared memory per program, for a device that cannot be asked.
    """
    tokens = shape.height * shape.width
    product = None
    if dim and shape.dtype in SIXTEEN_BITS:
        product = projection_tile(shape.batch, tokens, dim, shared or shared_memory(shape.device))
    if shape.convolution == "bands" and dim and product is not None:
        return plan_bands(shape, dim, product)
    batch, channels, half, levels = shape.batch, shape.channels, shape.half, len(shape.scales)
    lengths, lower = levels_of(shape), shape.sizes[1:]
    wide = dim or 1
    widths = {"channels": channels, "dim": wide}
    chunk, chunks, context_programs = sums_of(shape, dim)

    pool = None
    if lower or dim:
        counts = [batch * rows * ceil(cols / 16) * ceil(channels / 64) for rows, cols in lower]
        _, second, mean = padded_starts(counts, 2)
        numbers = lengths | widths | {"chunk": chunk, "chunks": chunks}
        numbers |= {"first2": second, "first_mean": mean}
        spans = [exact_span(shape, size) for size in [*lower, (1, 1), (1, 1)][:2]]
        constants = {"LEVELS": levels, "SPAN1": spans[0], "SPAN2": spans[1], "COLUMNS": 16}
        constants |= {"CHANNELS": 64, "TOKENS": 64, "SUMS": SUMS}
        pool = Launch(pool_kernel, mean + context_programs * chunks, Tensors, numbers, constants)

    tile = convolution_tile(batch, shape.sizes[0], half)
    counts = [tile.programs(batch, size, half) for size in shape.sizes]
    _, first1, first2, mean = padded_starts(counts, 3)
    numbers = lengths | widths | {"first1": first1, "first2": first2, "first_mean": mean}
    numbers |= {"half": half, "chunks": chunks, "shifts": shape.kernel_size, "gain": shape.gain}
    constants = {"LEVELS": levels, "SIGMOID": shape.gate == "sigmoid", "BIASED": shape.biased}
    constants |= {"K": shape.kernel_size} | tile.constants | {"SUMS": SUMS}
    convolve = Launch(gated_kernel, mean + context_programs, Tensors, numbers, constants)

    upsample = None
    if lower or dim:
        upsample = plan_upsampling(shape, dim)

    project = None
    if dim and product is not None:
        project = plan_projection(batch, tokens, half * levels, dim, product)
    shapes: dict[str, tuple[int, ...]] = {
        "low": (shape.low_positions * channels,),
        "gated_low": (shape.low_positions * half,),
        "partial": (batch, chunks, wide),
        "mean": (batch, wide),
        "context": (batch, wide),
        "planes": (0,),
        "bands": (0,),
        "pyramid": (batch if dim else 0, shape.height, shape.width, levels * half),
    }
    buffers, size = arrange(shapes, shape.dtype)
    starts = tuple(buffer.start for buffer in buffers.values())
    launches = tuple(launch for launch in (pool, convolve, upsample, project) if launch)
    return Forward(launches, pool, upsample, project, buffers, starts, size)


def plan_upsampling(shape: Shape, dim: int | None) -> Launch:
    """Bilinear upsampling of every lower level, and with C the context vector beside it."""
    batch, half, outputs = shape.batch, shape.half, 8
    lines, channels = 4, 32 if half % 32 == 0 else 16
    columns = 1024 // channels
    positions = ceil(shape.height / lines) * ceil(shape.width / columns)
    per_level = batch * positions * ceil(half / channels)
    context = per_level * (len(shape.scales) - 1)
    numbers = levels_of(shape) | {"first2": per_level, "first_context": context}
    numbers |= {"half": half, "dim": dim or 1}
    constants = {"LEVELS": len(shape.scales), "LINES": lines, "COLUMNS": columns}
    constants |= {"CHANNELS": channels, "OUTPUTS": outputs, "INPUTS": 256}
    programs = context + (batch * ceil(dim / outputs) if dim else 0)
    return Launch(upsample_kernel, programs, Tensors, numbers, constants)


# Tiles with the fewest programs that keep all multiprocessors busy; below that the next smaller
# tile is used. Measured on an H100 at the published shapes.
PROJECTION_TILES = (
    (512, ProjectionTile(128, 128, 64, 4, 3)),
    (64, ProjectionTile(64, 128, 64, 4, 3)),
    (1, ProjectionTile(64, 64, 64, 4, 4)),
)
NARROW_TILE = ProjectionTile(128, 64, 32, 4, 3)


def projection_tile(batch: int, tokens: int, dim: int, shared: int) -> ProjectionTile:
    """The largest tile that fits `shared` memory, divides the outputs and gives enough programs."""
    if dim % 128 == 0:
        for fewest, tile in PROJECTION_TILES:
            programs = batch * ceil(tokens / tile.tokens) * ceil(dim / tile.outputs)
            if programs >= fewest and tile.shared <= shared:
                return tile
    return NARROW_TILE


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one program may take; 48 KiB if the device does not report it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 48 * 1024
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 48 * 1024)


def plan_projection(batch: int, tokens: int, inner: int, dim: int, tile: ProjectionTile) -> Launch:
    """[batch, tokens, inner] · [inner, dim] → a launch."""
    constants = {"EVEN": inner % tile.inner == 0, "TOKENS": tile.tokens, "OUTPUTS": tile.outputs}
    programs = batch * ceil(tokens / tile.tokens) * ceil(dim / tile.outputs)
    numbers = {"tokens": tokens, "inner": inner, "dim": dim}
    constants |= {"INNER": tile.inner}
    options = {"warps": tile.warps, "stages": tile.stages}
    return Launch(project_kernel, programs, Tensors, numbers, constants, **options)
