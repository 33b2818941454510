"""The forward pass in Triton: pool, convolve, upsample, project."""

from collections.abc import Sequence

import torch

from ..reference import Biases, Projections
from .plan import plan_forward
from .shape import Shape
from .workspace import Tensors


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and 16-byte aligned, as compiled kernels expect it."""
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def three(
    tensors: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernels, the first one again for levels that the pyramid lacks."""
    first, second, third = [*tensors, tensors[0], tensors[0]][:3]
    return first, second, third


def three_biases(
    biases: Biases,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The biases, any of them in place of a missing one; None without any."""
    present = [aligned(bias) for bias in biases if bias is not None]
    if not present:
        return None, None, None
    rest = iter(present)
    return three([present[0] if bias is None else next(rest) for bias in biases])


def shape_of(
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales,
    gate: str,
    biases: Biases = (),
    convolution: str = "rows",
) -> Shape:
    """The plan's key for this call."""
    biased = 0
    for level, bias in enumerate(biases):
        biased |= (bias is not None) << level
    batch, height, width, channels = u.shape
    sizes = (batch, height, width, channels, weights[0].shape[0])
    return Shape(*sizes, tuple(scales), gate, u.dtype, u.device, biased, convolution)


def refuse_gradient(*tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError if a launch would silently lose a gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "Expected no gradient to be needed here, got a tensor that requires one. Call the op "
            "of the same name in `kernels`, which records it, or enter torch.no_grad()."
        )


def gated_pyramid(
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    biases: Biases = (),
) -> torch.Tensor:
    """u [B, H, W, h], kernels [k, k, h] → [B, H, W, S · h/2]; see `gated_pyramid_definition`."""
    refuse_gradient(u, *weights, *biases)
    u, weights = aligned(u), [aligned(weight) for weight in weights]
    shape = shape_of(u, weights, scales, gate, biases)
    plan = plan_forward(shape, None, None)
    memory, buffers = plan.memory(u.device)
    out = torch.empty(*u.shape[:3], len(weights) * shape.half, dtype=u.dtype, device=u.device)
    nothing = weights[0]
    absent = Projections(nothing, nothing, nothing, nothing)
    kernels, added = three(weights), three_biases(biases)
    tensors = Tensors(u, nothing, *kernels, *added, *absent, nothing, *buffers[:-1], out)
    for launch in plan.launches:
        launch(tensors)
    del memory
    return out


def pyramid_projection(
    x: torch.Tensor,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    projections: Projections,
    biases: Biases = (),
    convolution: str = "rows",
) -> torch.Tensor:
    """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C] in four launches.

    See `pyramid_projection_definition`.
    """
    refuse_gradient(x, u, *weights, *projections, *biases)
    x, u, weights = aligned(x), aligned(u), [aligned(weight) for weight in weights]
    projections = Projections._make([aligned(tensor) for tensor in projections])
    batch, height, width, dim = x.shape
    shape = shape_of(u, weights, scales, gate, biases, convolution)
    plan = plan_forward(shape, dim, x.dtype)
    memory, buffers = plan.memory(u.device)
    result = torch.empty(batch, height, width, dim, dtype=u.dtype, device=u.device)
    kernels, added = three(weights), three_biases(biases)
    tensors = Tensors(u, x, *kernels, *added, *projections, result, *buffers)
    for launch in plan.launches:
        launch(tensors)
    if plan.project is not None:
        return result
    context, pyramid = (plan.buffers[name].of(memory) for name in ("context", "pyramid"))
    tokens, rows = pyramid.view(batch, height * width, -1), result.view(batch, height * width, dim)
    for image in range(batch):
        bias = context[image].to(u.dtype)
        torch.addmm(bias, tokens[image], projections.out_weight.t(), out=rows[image])
    return result
