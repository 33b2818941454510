"""The ops as torch custom operators: torch.compile sees one node each, autograd one function.

`dispatch` calls them where torch.compile traces; everywhere else it goes past torch's dispatcher,
which costs more than a small launch. `recorded` holds the gradients of eager calls.
"""

import torch

from . import dispatch

_PYRAMID = "Tensor u, Tensor[] weights, float[] scales, str gate"
_PROJECTION = (
    "Tensor x, Tensor u, Tensor[] weights, float[] scales, str gate, "
    "Tensor out_weight, Tensor out_bias, Tensor pool_weight, Tensor pool_bias"
)


def _define(name: str, arguments: str, result: str):
    schema = f"({arguments}) -> {result}"
    return torch.library.custom_op(f"deltaconv::{name}", mutates_args=(), schema=schema)


@_define("gated_pyramid", _PYRAMID, "Tensor")
def gated_pyramid(u, weights, scales, gate):
    """u [B, H, W, h] → [B, H, W, S · h/2]."""
    request = dispatch.request_of(u, weights, scales)
    return dispatch.run("gated_pyramid", request, u, weights, scales, gate)


@gated_pyramid.register_fake
def _(u, weights, scales, gate):
    return u.new_empty(*u.shape[:3], u.shape[3] // 2 * len(scales))


@_define("gated_pyramid_backward", f"Tensor gradient, {_PYRAMID}", "Tensor[]")
def gated_pyramid_backward(gradient, u, weights, scales, gate):
    """gradient [B, H, W, S · h/2] → gradients of u and every kernel."""
    request = dispatch.request_of(u, weights, scales)
    return dispatch.run("gated_pyramid_backward", request, gradient, u, weights, scales, gate)


@gated_pyramid_backward.register_fake
def _(gradient, u, weights, scales, gate):
    return [u.new_empty(tensor.shape) for tensor in (u, *weights)]


def _keep_pyramid(ctx, inputs, output):
    u, weights, ctx.scales, ctx.gate = inputs
    ctx.save_for_backward(u, *weights)


def _backward_pyramid(ctx, gradient):
    u, *weights = ctx.saved_tensors
    to_u, *to_weights = gated_pyramid_backward(gradient, u, weights, ctx.scales, ctx.gate)
    return to_u, to_weights, None, None


gated_pyramid.register_autograd(_backward_pyramid, setup_context=_keep_pyramid)


@_define("pyramid_projection", _PROJECTION, "Tensor")
def pyramid_projection(x, u, weights, scales, gate, *linear):
    """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C]."""
    request = dispatch.request_of(u, weights, scales)
    return dispatch.run("pyramid_projection", request, x, u, weights, scales, gate, *linear)


@pyramid_projection.register_fake
def _(x, u, weights, scales, gate, *linear):
    return u.new_empty(x.shape)


@_define("pyramid_projection_backward", f"Tensor gradient, {_PROJECTION}", "Tensor[]")
def pyramid_projection_backward(gradient, x, u, weights, scales, gate, *linear):
    """gradient [B, H, W, C] → gradients of x's mean, u, both projections and every kernel."""
    request = dispatch.request_of(u, weights, scales)
    arguments = (gradient, x, u, weights, scales, gate, *linear)
    return dispatch.run("pyramid_projection_backward", request, *arguments)


@pyramid_projection_backward.register_fake
def _(gradient, x, u, weights, scales, gate, *linear):
    mean = x.new_empty(x.shape[0], 1, 1, x.shape[3])
    return [mean, *(u.new_empty(tensor.shape) for tensor in (u, *linear, *weights))]


def _keep_projection(ctx, inputs, output):
    x, u, weights, ctx.scales, ctx.gate, *linear = inputs
    ctx.save_for_backward(x, u, *linear, *weights)


def _backward_projection(ctx, gradient):
    x, u, *tensors = ctx.saved_tensors
    linear, weights = tensors[:4], tensors[4:]
    to_mean, to_u, *rest = pyramid_projection_backward(
        gradient, x, u, weights, ctx.scales, ctx.gate, *linear
    )
    tokens = x.shape[1] * x.shape[2]
    to_x = (to_mean / tokens).expand_as(x)
    return to_x, to_u, rest[4:], None, None, *rest[:4]


pyramid_projection.register_autograd(_backward_projection, setup_context=_keep_projection)
