"""The plan of a backward pass: its launches, and where each finds its tensors."""

from collections import namedtuple
from collections.abc import Mapping
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch

from .collect import collect_kernel, finish_kernel
from .gradients import gate_gradient_kernel, input_gradient_kernel, weight_gradient_kernel
from .launch import Launch
from .plan import convolution_tile
from .pool import unpool_kernel
from .shape import SUMS, Shape, exact_span, levels_of, padded_starts, sums_of
from .upsample import downsample_kernel
from .workspace import Buffer, arrange


class Level(NamedTuple):
    """One level's tensors, as the kernels of its gradients name them; `bias` None without one.

    Gradients: `upstream` of its gated map, `convolved` of its convolution, `to_source` of its
    input, `partial` of its kernel and bias, in strips. `pyramid` receives the gated map on demand.
    """

    source: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    upstream: torch.Tensor
    pyramid: torch.Tensor
    convolved: torch.Tensor
    to_source: torch.Tensor
    partial: torch.Tensor


class Upsampled(NamedTuple):
    """Gradient of a level's channels in the pyramid → of its own small gated map."""

    to_pyramid: torch.Tensor
    upstream: torch.Tensor


class Pooled(NamedTuple):
    """Gradient of the lower levels' inputs → added to that of u."""

    to_low: torch.Tensor
    to_u: torch.Tensor


@lru_cache(maxsize=256)
def plan_level(shape: Shape, level: int, keep: bool) -> tuple[Launch, Launch, Launch, int]:
    """Launches of one level: through the gate, to its input, to its kernel; strips per image."""
    batch, channels, half, k = shape.batch, shape.channels, shape.half, shape.kernel_size
    rows, columns = size = shape.sizes[level]
    stride = half * len(shape.scales)
    # The full level is a slice of the concatenated buffers, every lower one a separate map.
    strides = stride if level == 0 else half
    numbers = {"rows": rows, "columns": columns, "channels": channels, "shifts": k}

    tile = convolution_tile(batch, size, half)
    biased = shape.biased >> level & 1
    constants = {"KEEP": keep, "SIGMOID": shape.gate == "sigmoid", "BIASED": biased, "K": k}
    constants |= tile.constants
    more = {"half": half, "stride": strides, "out_stride": strides, "gain": shape.gain}
    programs = tile.programs(batch, size, half)
    through = Launch(gate_gradient_kernel, programs, Level, numbers | more, constants)

    tile = convolution_tile(batch, size, channels)
    programs, constants = tile.programs(batch, size, channels), {"K": k} | tile.constants
    to_input = Launch(input_gradient_kernel, programs, Level, numbers, constants)

    tile = tile._replace(rows=8)
    blocks = ceil(channels / tile.channels)
    # Enough strips to fill the device, none shorter than one tile of rows.
    strips = max(1, min(ceil(rows / tile.rows), ceil(1024 / (k * blocks * batch))))
    strip = tile.rows * ceil(rows / (tile.rows * strips))
    strips = ceil(rows / strip)
    numbers |= {"batch": batch, "strips": strips, "strip": strip}
    constants = {"BIASED": biased, "K": k} | tile.constants
    to_kernel = Launch(
        weight_gradient_kernel, k * blocks * batch * strips, Level, numbers, constants
    )
    return through, to_input, to_kernel, strips


@lru_cache(maxsize=256)
def plan_resampling(shape: Shape) -> tuple[list[Launch], Launch | None]:
    """Adjoints of the upsampling, one per lower level, and of all pooling."""
    batch, half, channels = shape.batch, shape.half, shape.channels
    block = 32 if half % 32 == 0 else 16
    down = []
    for rows, columns in shape.sizes[1:]:
        # A coarse position contributes to positions less than one coarse step away.
        reach_y, reach_x = ceil(2 * shape.height / rows), ceil(2 * shape.width / columns)
        numbers = {"batch": batch, "height": shape.height, "width": shape.width, "rows": rows}
        numbers |= {"columns": columns, "reach_y": reach_y, "reach_x": reach_x, "half": half}
        numbers["stride"] = half * len(shape.scales)
        programs = batch * rows * ceil(columns / 32) * ceil(half / block)
        constants = {"COLUMNS": 32, "CHANNELS": block}
        down.append(Launch(downsample_kernel, programs, Upsampled, numbers, constants))
    if not down:
        return down, None
    programs = batch * shape.height * ceil(shape.width / 16) * ceil(channels / 64)
    constants = {"LEVELS": len(shape.scales), "COLUMNS": 16, "CHANNELS": 64}
    numbers = levels_of(shape) | {"channels": channels}
    return down, Launch(unpool_kernel, programs, Pooled, numbers, constants)


class Given(NamedTuple):
    """What a backward pass is given, and the gradients and maps that it fills, by name.

    `to_pyramid` [B, H, W, S · h/2] is the gradient of `pyramid`, which is recomputed; the gradient
    of x is `to_mean` [B, 1, 1, C] everywhere.
    """

    gradient: torch.Tensor
    x: torch.Tensor
    u: torch.Tensor
    weight0: torch.Tensor
    weight1: torch.Tensor
    weight2: torch.Tensor
    bias0: torch.Tensor | None
    bias1: torch.Tensor | None
    bias2: torch.Tensor | None
    pool_weight: torch.Tensor
    to_pyramid: torch.Tensor
    pyramid: torch.Tensor
    to_u: torch.Tensor
    to_mean: torch.Tensor
    to_out_bias: torch.Tensor
    to_pool: torch.Tensor
    to_pool_bias: torch.Tensor
    to_weight0: torch.Tensor
    to_weight1: torch.Tensor
    to_weight2: torch.Tensor
    to_bias0: torch.Tensor | None
    to_bias1: torch.Tensor | None
    to_bias2: torch.Tensor | None


class Held(NamedTuple):
    """The working memory of a backward pass, by name."""

    low: torch.Tensor
    to_low: torch.Tensor
    gated_low: torch.Tensor
    upstream: torch.Tensor
    convolved: torch.Tensor
    partial: torch.Tensor
    partial_gradient: torch.Tensor
    strips: torch.Tensor


# The names of both: what the first and the last launch pick from.
All = namedtuple("All", (*Given._fields, *Held._fields))

# A tensor by its name, and the byte in it where a launch's own begins.
Slot = tuple[str, int]


class Step(NamedTuple):
    """A launch, and the tensors of its fields in their order."""

    launch: Launch
    slots: tuple[Slot, ...]


class Backward(NamedTuple):
    """The steps of a backward pass, and its working memory, the buffers of `Held`, in bytes."""

    steps: tuple[Step, ...]
    buffers: Mapping[str, Buffer]
    size: int


@lru_cache(maxsize=256)
def plan_gradients(shape: Shape, dim: int, x_dtype: torch.dtype) -> Backward:
    """Shape of u, C and dtype of x → every launch between the two products of a backward pass.

    `x_dtype` is part of the key only, as in `plan_forward`.
    """
    batch, channels, half, levels = shape.batch, shape.channels, shape.half, len(shape.scales)
    k, lower, size = shape.kernel_size, shape.sizes[1:], shape.dtype.itemsize
    block = 32 if half % 32 == 0 else 16
    sums, lengths = sums_of(shape, dim), levels_of(shape)
    everything = tuple((name, 0) for name in All._fields)

    reach = {}
    for level, (rows, columns) in enumerate([*lower, (1, 1), (1, 1)][:2], start=1):
        # A coarse position contributes to positions less than one coarse step away.
        reach |= {f"reach_y{level}": ceil(2 * shape.height / rows)}
        reach |= {f"reach_x{level}": ceil(2 * shape.width / columns)}
    pools = [batch * rows * ceil(columns / 16) * ceil(channels / 64) for rows, columns in lower]
    downs = [batch * rows * ceil(columns / 32) * ceil(half / block) for rows, columns in lower]
    missing = [0] * (2 - len(lower))
    starts = padded_starts([*pools, *missing, *downs, *missing], 4)
    names = ("first_pool2", "first_down", "first_down2", "first_x")
    numbers = lengths | reach | dict(zip(names, starts[1:], strict=True))
    first_gradient = starts[-1] + sums.programs * sums.chunks
    numbers |= {"first_gradient": first_gradient, "channels": channels, "half": half, "dim": dim}
    numbers |= {"chunk": sums.chunk, "chunks": sums.chunks}
    spans = [*(exact_span(shape, each) for each in lower), 0, 0][:2]
    tile = {"COLUMNS": 16, "CHANNELS": 64}
    constants = {"LEVELS": levels, "SPAN1": spans[0], "SPAN2": spans[1], **tile}
    constants |= {"COARSE": 32, "BLOCK": block}
    constants |= {"TOKENS": 64, "SUMS": SUMS}
    programs = first_gradient + sums.programs * sums.chunks
    steps = [Step(Launch(collect_kernel, programs, All, numbers, constants), everything)]

    position = strip_start = 0
    strip_rows, strip_starts, entries, blocks = [], [], 256, []
    for level, (rows, columns) in enumerate(shape.sizes):
        *launches, strips = plan_level(shape, level, True)
        taps = k * k + (shape.biased >> level & 1)
        strip_starts.append(strip_start)
        strip_rows.append(batch * strips)
        blocks.append(ceil(taps * channels / entries))
        here, gated = position * channels * size, position * half * size
        slots = {
            "source": ("u", 0) if level == 0 else ("low", here),
            "weight": (f"weight{level}", 0),
            "bias": (f"bias{level}", 0),
            "upstream": ("to_pyramid", 0) if level == 0 else ("upstream", gated),
            "pyramid": ("pyramid", 0) if level == 0 else ("gated_low", gated),
            "convolved": ("convolved", 0),
            "to_source": ("to_u", 0) if level == 0 else ("to_low", here),
            "partial": ("strips", 4 * strip_start),
        }
        ordered = tuple(slots[name] for name in Level._fields)
        steps += [Step(launch, ordered) for launch in launches]
        strip_start += batch * strips * taps * channels
        position += batch * rows * columns if level else 0

    unpools = batch * shape.height * ceil(shape.width / 16) * ceil(channels / 64) if lower else 0
    ups = batch * ceil(shape.height / 4) * ceil(shape.width / (1024 // block)) * ceil(half / block)
    counts = [unpools, *[ups] * len(lower), *missing, *blocks, *missing]
    sums_blocks = ceil(dim / SUMS)
    starts = padded_starts([*counts, sums_blocks**2, batch * sums_blocks], 8)
    names = ("first_up", "first_up2", "first_strip", "first_strip1", "first_strip2")
    names += ("first_pool", "first_mean")
    numbers = lengths | dict(zip(names, starts[1:], strict=False))
    padded = [*strip_rows, 0, 0][:3], [*strip_starts, 0, 0][:3]
    numbers |= dict(zip(("rows0", "rows1", "rows2"), padded[0], strict=True))
    numbers |= {"start1": padded[1][1], "start2": padded[1][2]}
    numbers |= {"channels": channels, "half": half, "dim": dim, "chunks": sums.chunks}
    constants = {"LEVELS": levels, "BIASED": shape.biased, "K": k, **tile, "LINES": 4}
    constants |= {"FINE": 1024 // block, "BLOCK": block, "ENTRIES": entries, "SUMS": SUMS}
    steps.append(Step(Launch(finish_kernel, starts[-1], All, numbers, constants), everything))

    shapes: dict[str, tuple[int, ...]] = {
        "low": (shape.low_positions * channels,),
        "to_low": (shape.low_positions * channels,),
        "gated_low": (shape.low_positions * half,),
        "upstream": (shape.low_positions * half,),
        # One level at a time uses it.
        "convolved": (batch * shape.height * shape.width * channels,),
        "partial": (batch, sums.chunks, dim),
        "partial_gradient": (batch, sums.chunks, dim),
        "strips": (strip_start,),
    }
    buffers, memory = arrange(shapes, shape.dtype)
    return Backward(tuple(steps), buffers, memory)
