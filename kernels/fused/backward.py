"""The backward pass in Triton: only u and x were saved, everything else is recomputed."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..reference import Biases, Projections
from .forward import aligned, shape_of, three
from .plan import plan_forward
from .plan_gradients import (
    Backward,
    Given,
    Level,
    Pooled,
    Upsampled,
    plan_gradients,
    plan_level,
    plan_resampling,
)
from .workspace import Tensors


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
    """As `eager.pyramid_projection_backward`, in two products and the launches between them."""
    gradient, x, u = aligned(gradient), aligned(x), aligned(u)
    weights = [aligned(weight) for weight in weights]
    biases = [None if bias is None else aligned(bias) for bias in biases]
    projections = Projections._make([aligned(tensor) for tensor in projections])
    planned = plan_gradients(shape_of(u, weights, scales, gate, biases), x.shape[3], x.dtype)
    tensors = (gradient, x, u, weights, biases, projections)
    return made_gradients(planned, tensors, partial(launch_all, planned))


def made_gradients(planned: Backward, tensors: tuple, launch: Callable) -> list[torch.Tensor]:
    """Everything of a backward pass but its launches, which `launch(given, memory)` does.

    `tensors`: the gradient, x, u, kernels, biases and projections. `given` has a tensor or None for
    every name of `Given`.
    """
    gradient, x, u, weights, biases, projections = tensors
    batch, _, _, dim = x.shape
    rows = gradient.view(-1, dim)
    to_pyramid = rows @ projections.out_weight
    pyramid = torch.empty_like(to_pyramid)
    memory = torch.empty(planned.size, dtype=torch.uint8, device=u.device)
    to_u, to_mean = torch.empty_like(u), x.new_empty(batch, 1, 1, dim)
    pool_weight, pool_bias = projections.pool_weight, projections.pool_bias
    to_pool = torch.empty_like(pool_weight)
    to_out_bias, to_pool_bias = torch.empty_like(pool_bias), torch.empty_like(pool_bias)
    to_weights = [torch.empty_like(weight) for weight in weights]
    to_biases = [None if bias is None else torch.empty_like(bias) for bias in biases]
    # Missing levels and biases have none; kernels never read the stand-in of a level.
    kernels, to_kernels = three(weights), three(to_weights)
    added = [*biases, None, None, None][:3]
    to_added = three_or_none(to_biases)
    made = (to_pyramid, pyramid, to_u, to_mean, to_out_bias, to_pool, to_pool_bias)
    given = (gradient, x, u, *kernels, *added, pool_weight, *made, *to_kernels, *to_added)
    launch(given, memory)
    to_out = rows.t() @ pyramid
    there = [bias for bias in to_biases if bias is not None]
    return [to_mean, to_u, to_out, to_out_bias, to_pool, to_pool_bias, *to_weights, *there]


def three_or_none(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The tensors, any of them in place of a missing one; None without any."""
    present = next((tensor for tensor in tensors if tensor is not None), None)
    return [present if tensor is None else tensor for tensor in [*tensors, None, None, None][:3]]


def launch_all(planned: Backward, given: tuple, memory: torch.Tensor) -> None:
    """Launches every step on the tensors of `Given`; addresses once every launch takes them."""
    tensors = dict(zip(Given._fields, given, strict=True))
    ready = all([step.launch.ready for step in planned.steps])
    if ready:
        start = memory.data_ptr()
        places = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
        places |= {name: start + buffer.start for name, buffer in planned.buffers.items()}
        for launch, slots in planned.steps:
            launch(tuple([places[name] + at if name in places else None for name, at in slots]))
        return
    tensors |= {name: buffer.of(memory) for name, buffer in planned.buffers.items()}
    for launch, slots in planned.steps:
        launch(tuple([_behind(tensors[name], at) for name, at in slots]))


def _behind(tensor: torch.Tensor | None, offset: int) -> torch.Tensor | None:
    """The tensor from a byte on."""
    if tensor is None or not offset:
        return tensor
    return tensor.view(-1)[offset // tensor.itemsize :]
