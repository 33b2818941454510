"""The plan of a forward pass whose convolutions are products on tensor cores."""

from math import ceil
from typing import NamedTuple

from .bands import bands_kernel
from .launch import Launch
from .planes import project_planes_kernel, turn_kernel, upsample_planes_kernel
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
from .workspace import Tensors, arrange


class BandTile(NamedTuple):
    """Rows of a patch, patches of a program and its warps.

    With a multiple of 64 patches to four warps Triton takes Hopper's products of whole warp groups,
    whose bands stay in shared memory; else each warp holds its own in registers.
    """

    rows: int
    patches: int
    warps: int

    def programs(self, size: tuple[int, int], across: int) -> int:
        """Programs that cover one channel's map of that size, `across` patches wide."""
        wide = min(across, self.patches)
        return ceil(size[0] / (self.patches // wide * self.rows)) * ceil(across / wide)


# Not measured yet: by the instructions it compiles to, the best of `TRIED`.
TILE = BandTile(8, 32, 2)
TRIED = (TILE, BandTile(4, 32, 2), BandTile(8, 16, 1), BandTile(4, 64, 4), BandTile(8, 64, 4))
# Positions × channels of a program that turns a map.
COLUMNS, CHANNELS = 32, 32
# Channels of a program that makes bands.
LANES = 8


def step_of(kernel_size: int) -> int:
    """Columns of a patch: their inputs are twice as many, half of them beside it."""
    return 8 if kernel_size <= 9 else 16


def band_tile(size: tuple[int, int], across: int) -> BandTile:
    """`TILE`, with fewer rows to a patch on a map that is too low for them."""
    high = TILE.patches // min(across, TILE.patches)
    rows = next((rows for rows in (8, 4, 2) if high * rows <= size[0]), 2)
    return TILE._replace(rows=min(rows, TILE.rows))


def plan_bands(
    shape: Shape, dim: int, product: ProjectionTile, tile: BandTile | None = None
) -> Forward:
    """As `plan_forward`, of a shape in 16 bits with its projection; `tile`: other than its own."""
    batch, channels, half, levels = shape.batch, shape.channels, shape.half, len(shape.scales)
    size, step = shape.kernel_size, step_of(shape.kernel_size)
    tokens = shape.height * shape.width
    vectors = ceil(tokens / 16)
    across = [ceil(columns / step) for _, columns in shape.sizes]
    padded = [(tiles + 1) * step for tiles in across]
    sums = sums_of(shape, dim)
    lengths = levels_of(shape)
    _, second, third = [*across, 1, 1][:3]
    tiles = {"tiles": across[0], "tiles1": second, "tiles2": third}
    kind = {"SIGMOID": shape.gate == "sigmoid", "BIASED": shape.biased}

    spans = [*(exact_span(shape, lower) for lower in shape.sizes[1:]), 0, 0][:2]
    # Programs of one level: over rows, blocks of positions and blocks of channels.
    counts = [
        batch * rows * ceil(columns / COLUMNS) * ceil(channels / CHANNELS)
        for (rows, _), columns in zip(shape.sizes, padded, strict=True)
    ]
    if spans[0] == 2:
        # The full level's programs go by the positions of level 1, which they make as well.
        counts[0], counts[1] = counts[1], 0
    _, first1, first2, band = padded_starts(counts, 3)
    mean = band + levels * size * ceil(channels / LANES)
    numbers = lengths | tiles | {"first1": first1, "first2": first2, "first_band": band}
    numbers |= {"first_mean": mean, "channels": channels, "dim": dim}
    numbers |= {"chunk": sums.chunk, "chunks": sums.chunks}
    constants = {"LEVELS": levels, "SPAN1": spans[0], "SPAN2": spans[1], "K": size, "STEP": step}
    constants |= {"COLUMNS": COLUMNS, "CHANNELS": CHANNELS, "LANES": LANES}
    constants |= {"TOKENS": 64, "SUMS": SUMS}
    turn = Launch(turn_kernel, mean + sums.programs * sums.chunks, Tensors, numbers, constants)

    tile = tile or band_tile(shape.sizes[0], across[0])
    counts = [
        batch * half * tile.programs(level, wide)
        for level, wide in zip(shape.sizes, across, strict=True)
    ]
    _, first1, first2, mean = padded_starts(counts, 3)
    numbers = lengths | tiles | {"vectors": vectors, "first1": first1, "first2": first2}
    numbers |= {"first_mean": mean, "channels": channels, "half": half, "dim": dim}
    numbers |= {"chunks": sums.chunks, "gain": shape.gain}
    constants = {"LEVELS": levels, **kind, "K": size, "ROWS": tile.rows, "STEP": step}
    constants |= {"PATCHES": tile.patches, "SUMS": SUMS}
    programs, options = mean + sums.programs, {"warps": tile.warps}
    convolve = Launch(bands_kernel, programs, Tensors, numbers, constants, **options)

    columns, lanes, outputs = 64, 16, 8
    per_level = batch * shape.height * ceil(shape.width / columns) * ceil(half / lanes)
    context = per_level * (levels - 1)
    numbers = lengths | {"vectors": vectors, "first2": per_level, "first_context": context}
    numbers |= {"half": half, "dim": dim}
    constants = {"LEVELS": levels, "COLUMNS": columns, "CHANNELS": lanes}
    constants |= {"OUTPUTS": outputs, "INPUTS": 256}
    programs = context + batch * ceil(dim / outputs)
    upsample = Launch(upsample_planes_kernel, programs, Tensors, numbers, constants)

    inner = half * levels
    numbers = {"tokens": tokens, "vectors": vectors, "inner": inner, "dim": dim}
    constants = {"EVEN": inner % product.inner == 0, "TOKENS": product.tokens}
    constants |= {"OUTPUTS": product.outputs, "INNER": product.inner}
    programs = batch * ceil(tokens / product.tokens) * ceil(dim / product.outputs)
    options = {"warps": product.warps, "stages": product.stages}
    project = Launch(project_planes_kernel, programs, Tensors, numbers, constants, **options)

    shapes: dict[str, tuple[int, ...]] = {
        "low": (0,),
        "gated_low": (shape.low_positions * half,),
        "partial": (batch, sums.chunks, dim),
        "mean": (batch, dim),
        "context": (batch, dim),
        "planes": (
            sum(
                batch * channels * height * columns
                for (height, _), columns in zip(shape.sizes, padded, strict=True)
            ),
        ),
        "bands": (levels, channels, size, 2 * step, step),
        "pyramid": (batch, inner, 16 * vectors),
    }
    buffers, memory = arrange(shapes, shape.dtype)
    starts = tuple(buffer.start for buffer in buffers.values())
    launches = (turn, convolve, upsample, project)
    return Forward(launches, turn, upsample, project, buffers, starts, memory)
