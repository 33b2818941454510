"""The backward pass in Triton: everything but u and x is computed again, nothing else was saved."""

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import torch

from ..gated_pyramid import Biases
from ..torch_forms import projection_backward
from .forward import aligned, shape_of
from .gradients import gate_gradient_kernel, input_gradient_kernel, weight_gradient_kernel
from .plan import Launch, Shape, convolution_tile, levels_of, plan_forward
from .pool import unpool_kernel
from .upsample import downsample_kernel


@lru_cache(maxsize=256)
def plan_level(shape: Shape, level: int, keep: bool) -> tuple[Launch, Launch, Launch, int]:
    """Launches of one level: through the gate, to its input, to its kernel; strips per image."""
    batch, channels, half, k = shape.batch, shape.channels, shape.half, shape.kernel_size
    rows, columns = size = shape.sizes[level]
    stride = half * len(shape.scales)
    # The full level lives in the concatenated buffers, every lower one in a map of its own.
    strides = (stride, stride) if level == 0 else (half, half)

    tile = convolution_tile(batch, size, half)
    biased = shape.biased >> level & 1
    constants = {"KEEP": keep, "SIGMOID": shape.gate == "sigmoid", "BIASED": biased, "K": k}
    constants |= tile.constants
    numbers = (rows, columns, channels, half, *strides, k, shape.gain)
    through = Launch(gate_gradient_kernel, tile.programs(batch, size, half), numbers, constants)

    tile = convolution_tile(batch, size, channels)
    numbers, constants = (rows, columns, channels, k), {"K": k} | tile.constants
    to_input = Launch(
        input_gradient_kernel, tile.programs(batch, size, channels), numbers, constants
    )

    tile = tile._replace(rows=8)
    blocks = ceil(channels / tile.channels)
    # Enough strips to fill the device, none shorter than one tile of rows.
    strips = max(1, min(ceil(rows / tile.rows), ceil(1024 / (k * blocks * batch))))
    strip = tile.rows * ceil(rows / (tile.rows * strips))
    strips = ceil(rows / strip)
    numbers, constants = (
        (batch, rows, columns, strips, strip, channels, k),
        {"BIASED": biased, "K": k} | tile.constants,
    )
    to_kernel = Launch(weight_gradient_kernel, k * blocks * batch * strips, numbers, constants)
    return through, to_input, to_kernel, strips


@lru_cache(maxsize=256)
def plan_resampling(shape: Shape) -> tuple[list[Launch], Launch | None]:
    """Adjoints of the upsampling, one per lower level, and of all pooling."""
    batch, half, channels = shape.batch, shape.half, shape.channels
    block = 32 if half % 32 == 0 else 16
    down = []
    for rows, columns in shape.sizes[1:]:
        # Positions less than one coarse step away on either side hold a coarse position.
        reach = [ceil(2 * shape.height / rows), ceil(2 * shape.width / columns)]
        numbers = (batch, shape.height, shape.width, rows, columns, *reach, half)
        numbers += (half * len(shape.scales),)
        programs = batch * rows * ceil(columns / 32) * ceil(half / block)
        constants = {"COLUMNS": 32, "CHANNELS": block}
        down.append(Launch(downsample_kernel, programs, numbers, constants))
    if not down:
        return down, None
    programs = batch * shape.height * ceil(shape.width / 16) * ceil(channels / 64)
    constants = {"LEVELS": len(shape.scales), "COLUMNS": 16, "CHANNELS": 64}
    return down, Launch(unpool_kernel, programs, (*levels_of(shape), channels), constants)


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

    `out` [B, H, W, S · h/2], if given, receives the pyramid itself, computed on the way.
    """
    gradient, u = aligned(gradient), aligned(u)
    weights = [aligned(weight) for weight in weights]
    biases = [None if bias is None else aligned(bias) for bias in biases]
    shape = shape_of(u, weights, scales, gate, biases)
    # Only its pooling and upsampling run here, in which a bias has no part.
    forward = plan_forward(shape, None, None)
    down, unpool = plan_resampling(shape)
    options = {"dtype": u.dtype, "device": u.device}
    nothing, keep = weights[0], out is not None

    low = torch.empty(shape.low_positions * shape.channels, **options)
    if forward.pool is not None:
        forward.pool(u, low, nothing, nothing)
    to_u = torch.empty_like(u)
    to_low = torch.empty_like(low)
    gated_low = torch.empty(shape.low_positions * shape.half, **options)
    to_weights, to_biases, start = [], [], 0
    for level, (rows, columns) in enumerate(shape.sizes):
        through, to_input, to_kernel, strips = plan_level(shape, level, keep)
        positions = shape.batch * rows * columns
        if level == 0:
            source, target, upstream, gated = u, to_u, gradient, out if keep else nothing
        else:
            here = slice(start * shape.channels, (start + positions) * shape.channels)
            source, target = low[here], to_low[here]
            gated = gated_low[start * shape.half : (start + positions) * shape.half]
            upstream = torch.empty_like(gated)
            # The view starts at this level's channels of the concatenated gradient.
            down[level - 1](gradient.flatten()[level * shape.half :], upstream)
            start += positions
        convolved = torch.empty(positions * shape.channels, **options)
        bias = biases[level] if biases else None
        through(source, weights[level], bias, upstream, gated, convolved)
        to_input(convolved, weights[level], target)
        k = shape.kernel_size
        taps = k * k + (bias is not None)
        partial = torch.empty(shape.batch * strips, taps, shape.channels, device=u.device)
        to_kernel(source, convolved, partial)
        total = partial.sum(0).to(u.dtype)
        to_weights.append(total[: k * k].view(k, k, shape.channels))
        if bias is not None:
            # A copy: results of an operator may not share memory.
            to_biases.append(total[-1].clone())
    if unpool is not None:
        unpool(to_low, to_u)
    if keep and forward.upsample is not None:
        forward.upsample(gated_low, out, nothing, nothing, nothing, nothing, nothing)
    return [to_u, *to_weights, *to_biases]


def pyramid_projection_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    pool_weight: torch.Tensor,
    pool_bias: torch.Tensor,
    biases: Biases = (),
) -> list[torch.Tensor]:
    """gradient [B, H, W, C] → gradients of x's mean [B, 1, 1, C], u, both projections, kernels …

    … and of every bias [h] that there is.
    """
    arguments = (gradient, x, u, weights, scales, gate, out_weight, pool_weight, biases)
    return projection_backward(gated_pyramid_backward, *arguments)
