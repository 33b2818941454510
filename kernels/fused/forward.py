"""The forward pass in Triton: pool, convolve, upsample, project."""

from collections.abc import Sequence

import torch

from .plan import Forward, Shape, plan_forward


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor contiguous and on a 16-byte boundary, as every compiled kernel expects it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def shape_of(u: torch.Tensor, weights: Sequence[torch.Tensor], scales, gate: str) -> Shape:
    """The plan's key for this call."""
    return Shape(*u.shape, weights[0].shape[0], tuple(scales), gate, u.dtype, u.device)


def refuse_gradient(*tensors: torch.Tensor) -> None:
    """Raises RuntimeError where autograd would silently lose the gradient of a bare launch."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "Expected no gradient to be needed here, got a tensor that requires one. Call the op "
            "of the same name in `kernels`, which records it, or enter torch.no_grad()."
        )


def gated_pyramid(
    u: torch.Tensor, weights: Sequence[torch.Tensor], scales: Sequence[float], gate: str
) -> torch.Tensor:
    """u [B, H, W, h], kernels [k, k, h] → [B, H, W, S · h/2]; see `gated_pyramid_definition`."""
    refuse_gradient(u, *weights)
    u, weights = aligned(u), [aligned(weight) for weight in weights]
    shape = shape_of(u, weights, scales, gate)
    plan = plan_forward(shape, None, None)
    # Kernels take every pointer; those behind a switched-off role are never read.
    nothing = weights[0]
    out, _, _ = pyramid(plan, shape, u, weights, nothing, nothing, nothing, nothing)
    return out


def pyramid_projection(
    x: torch.Tensor,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    pool_weight: torch.Tensor,
    pool_bias: torch.Tensor,
) -> torch.Tensor:
    """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C] in four launches.

    See `pyramid_projection_definition`.
    """
    refuse_gradient(x, u, *weights, out_weight, out_bias, pool_weight, pool_bias)
    x, u, weights = aligned(x), aligned(u), [aligned(weight) for weight in weights]
    out_weight, pool_weight = aligned(out_weight), aligned(pool_weight)
    batch, height, width, dim = x.shape
    shape = shape_of(u, weights, scales, gate)
    plan = plan_forward(shape, dim, x.dtype)
    biases = aligned(pool_bias), aligned(out_bias)
    out, _, context = pyramid(plan, shape, u, weights, x, pool_weight, *biases)
    result = torch.empty(batch, height, width, dim, dtype=u.dtype, device=u.device)
    if plan.project is not None:
        plan.project(out, out_weight, context, result)
        return result
    tokens, rows = out.view(batch, height * width, -1), result.view(batch, height * width, dim)
    for image in range(batch):
        bias = context[image].to(u.dtype)
        torch.addmm(bias, tokens[image], out_weight.t(), out=rows[image])
    return result


def pyramid(
    plan: Forward,
    shape: Shape,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    x: torch.Tensor,
    pool_weight: torch.Tensor,
    pool_bias: torch.Tensor,
    out_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All but the projection → pyramid [B, H, W, S · h/2], pooled levels, context [B, C]."""
    batch, levels, options = shape.batch, len(shape.scales), {"device": u.device}
    out = torch.empty(
        batch, shape.height, shape.width, levels * shape.half, dtype=u.dtype, **options
    )
    low = torch.empty(shape.low_positions * shape.channels, dtype=u.dtype, **options)
    gated_low = torch.empty(shape.low_positions * shape.half, dtype=u.dtype, **options)
    dim = pool_weight.shape[-1] if x is not pool_weight else 1
    partial = torch.empty(batch, plan.chunks, dim, dtype=torch.float32, **options)
    mean, context = torch.empty(2, batch, dim, dtype=torch.float32, **options)
    if plan.pool is not None:
        plan.pool(u, low, x, partial)
    three = [*weights, weights[0], weights[0]][:3]
    plan.convolve(u, low, *three, out, gated_low, partial, mean)
    if plan.upsample is not None:
        plan.upsample(gated_low, out, mean, pool_weight, pool_bias, out_bias, context)
    return out, low, context
