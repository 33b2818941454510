"""The ops as torch custom operators: torch.compile sees one node each, autograd one function.

`backend` calls them where torch.compile traces; everywhere else it goes past torch's dispatcher,
which costs more than a small launch. `autograd` holds the gradients of eager calls.
"""

import torch

from . import backend

_PYRAMID = "Tensor u, Tensor[] weights, float[] scales, str gate"
_LINEAR = "Tensor out_weight, Tensor out_bias, Tensor pool_weight, Tensor pool_bias"
# The biases that are there, and a bit for every scale that has one.
_BIASES = "Tensor[] biases, int biased"
_PROJECTION = f"Tensor x, {_PYRAMID}, {_LINEAR}, {_BIASES}"
_PYRAMID = f"{_PYRAMID}, {_BIASES}"


def _define(name: str, arguments: str, result: str):
    schema = f"({arguments}) -> {result}"
    return torch.library.custom_op(f"deltaconv::{name}", mutates_args=(), schema=schema)


def _run(op: str, maps: tuple, weights, scales, gate, *rest):
    *linear, present, biased = rest
    biases = backend.unpack(present, biased, len(scales))
    request = backend.request_of(maps[-1], weights, scales)
    return backend.run(op, request, *maps, weights, scales, gate, *linear, biases)


@_define("gated_pyramid", _PYRAMID, "Tensor")
def gated_pyramid(u, *arguments):
    """u [B, H, W, h] → [B, H, W, S · h/2]."""
    return _run("gated_pyramid", (u,), *arguments)


@gated_pyramid.register_fake
def _(u, weights, scales, gate, biases, biased):
    return u.new_empty(*u.shape[:3], u.shape[3] // 2 * len(scales))


@_define("gated_pyramid_backward", f"Tensor gradient, {_PYRAMID}", "Tensor[]")
def gated_pyramid_backward(gradient, u, *arguments):
    """gradient [B, H, W, S · h/2] → gradients of u, every kernel and every bias."""
    return _run("gated_pyramid_backward", (gradient, u), *arguments)


@gated_pyramid_backward.register_fake
def _(gradient, u, weights, scales, gate, biases, biased):
    return [u.new_empty(tensor.shape) for tensor in (u, *weights, *biases)]


def _keep_pyramid(ctx, inputs, output):
    u, weights, ctx.scales, ctx.gate, biases, ctx.biased = inputs
    ctx.save_for_backward(u, *weights, *biases)


def _backward_pyramid(ctx, gradient):
    u, *kernels = ctx.saved_tensors
    levels = len(ctx.scales)
    weights, biases = kernels[:levels], kernels[levels:]
    to_u, *rest = gated_pyramid_backward(
        gradient, u, weights, ctx.scales, ctx.gate, biases, ctx.biased
    )
    return to_u, rest[:levels], None, None, rest[levels:], None


gated_pyramid.register_autograd(_backward_pyramid, setup_context=_keep_pyramid)


@_define("pyramid_projection", _PROJECTION, "Tensor")
def pyramid_projection(x, u, *arguments):
    """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C]."""
    return _run("pyramid_projection", (x, u), *arguments)


@pyramid_projection.register_fake
def _(x, u, *arguments):
    return u.new_empty(x.shape)


@_define("pyramid_projection_backward", f"Tensor gradient, {_PROJECTION}", "Tensor[]")
def pyramid_projection_backward(gradient, x, u, *arguments):
    """gradient [B, H, W, C] → gradients of x's mean, u, both projections, kernels and biases."""
    return _run("pyramid_projection_backward", (gradient, x, u), *arguments)


@pyramid_projection_backward.register_fake
def _(gradient, x, u, weights, scales, gate, *rest):
    *linear, biases, _ = rest
    mean = x.new_empty(x.shape[0], 1, 1, x.shape[3])
    return [mean, *(u.new_empty(tensor.shape) for tensor in (u, *linear, *weights, *biases))]


def _keep_projection(ctx, inputs, output):
    x, u, weights, ctx.scales, ctx.gate, *linear, biases, ctx.biased = inputs
    ctx.save_for_backward(x, u, *linear, *weights, *biases)


def _backward_projection(ctx, gradient):
    x, u, *tensors = ctx.saved_tensors
    behind = 4 + len(ctx.scales)
    linear, weights, biases = tensors[:4], tensors[4:behind], tensors[behind:]
    to_mean, to_u, *rest = pyramid_projection_backward(
        gradient, x, u, weights, ctx.scales, ctx.gate, *linear, biases, ctx.biased
    )
    tokens = x.shape[1] * x.shape[2]
    to_x = (to_mean / tokens).expand_as(x)
    return to_x, to_u, rest[4:behind], None, None, *rest[:4], rest[behind:], None


pyramid_projection.register_autograd(_backward_projection, setup_context=_keep_projection)
