"""The backward pass in Triton: only u and x were saved, everything else is recomputed."""

from collections.abc import Sequence
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch

from .. import eager
from ..reference import Biases, Projections
from .forward import aligned, shape_of
from .gradients import gate_gradient_kernel, input_gradient_kernel, weight_gradient_kernel
from .launch import Launch
from .plan import convolution_tile, plan_forward
from .pool import unpool_kernel
from .shape import Shape, levels_of
from .upsample import downsample_kernel
from .workspace import Tensors


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


def gated_pyramid_backward(
    gradient: torch.Tensor,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    biases: Biases = (),
    out: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """gradient [B, H, W, S · h/2] → gradients of u [B, H, W, h], every kernel [k, k, h], bias [h].

    `out` [B, H, W, S · h/2], if given, receives the pyramid itself.
    """
    gradient, u = aligned(gradient), aligned(u)
    weights = [aligned(weight) for weight in weights]
    biases = [None if bias is None else aligned(bias) for bias in biases]
    shape = shape_of(u, weights, scales, gate, biases)
    # Only its pooling and upsampling run here, which take no bias.
    forward = plan_forward(shape, None, None)
    down, unpool = plan_resampling(shape)
    options = {"dtype": u.dtype, "device": u.device}
    nothing = weights[0]
    pyramid = nothing if out is None else out

    low = torch.empty(shape.low_positions * shape.channels, **options)
    gated_low = torch.empty(shape.low_positions * shape.half, **options)
    # Of these only u, both low maps and the pyramid are used.
    tensors = Tensors(*[nothing] * len(Tensors._fields))
    tensors = tensors._replace(u=u, low=low, gated_low=gated_low, pyramid=pyramid)
    if forward.pool is not None:
        forward.pool(tensors)
    to_u = torch.empty_like(u)
    to_low = torch.empty_like(low)
    to_weights, to_biases, start = [], [], 0
    for index, (rows, columns) in enumerate(shape.sizes):
        through, to_input, to_kernel, strips = plan_level(shape, index, out is not None)
        positions, k = shape.batch * rows * columns, shape.kernel_size
        bias = biases[index] if biases else None
        if index == 0:
            source, to_source, upstream, gated = u, to_u, gradient, pyramid
        else:
            here = slice(start * shape.channels, (start + positions) * shape.channels)
            source, to_source = low[here], to_low[here]
            gated = gated_low[start * shape.half : (start + positions) * shape.half]
            upstream = torch.empty_like(gated)
            # The view starts at this level's channels of the concatenated gradient.
            down[index - 1](Upsampled(gradient.flatten()[index * shape.half :], upstream))
            start += positions
        convolved = torch.empty(positions * shape.channels, **options)
        taps = k * k + (bias is not None)
        partial = torch.empty(shape.batch * strips, taps, shape.channels, device=u.device)
        level = Level(source, weights[index], bias, upstream, gated, convolved, to_source, partial)
        through(level)
        to_input(level)
        to_kernel(level)
        total = partial.sum(0).to(u.dtype)
        to_weights.append(total[: k * k].view(k, k, shape.channels))
        if bias is not None:
            # Copied: results of an operator may not share memory.
            to_biases.append(total[-1].clone())
    if unpool is not None:
        unpool(Pooled(to_low, to_u))
    if out is not None and forward.upsample is not None:
        forward.upsample(tensors)
    return [to_u, *to_weights, *to_biases]


def pyramid_projection_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    projections: Projections,
    biases: Biases = (),
) -> list[torch.Tensor]:
    """As `eager.pyramid_projection_backward`, around the pyramid's gradients in Triton."""
    arguments = (gradient, x, u, weights, scales, gate, projections, biases)
    return eager.pyramid_projection_backward(*arguments, pyramid_backward=gated_pyramid_backward)
