"""The ops with their gradients recorded, for eager calls of the Triton kernels.

The same as `operators` has for torch.compile; its custom operators take the host longer than the
kernels run.
"""

import torch
from torch.autograd.function import once_differentiable

from . import dispatch


class _Pyramid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scales, gate, u, *weights):
        ctx.scales, ctx.gate = scales, gate
        ctx.save_for_backward(u, *weights)
        request = dispatch.request_of(u, weights, scales)
        return dispatch.run("gated_pyramid", request, u, weights, scales, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        u, *weights = ctx.saved_tensors
        request = dispatch.request_of(u, weights, ctx.scales)
        arguments = (gradient, u, weights, ctx.scales, ctx.gate)
        return None, None, *dispatch.run("gated_pyramid_backward", request, *arguments)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scales, gate, x, u, out_weight, out_bias, pool_weight, pool_bias, *weights):
        ctx.scales, ctx.gate = scales, gate
        linear = (out_weight, out_bias, pool_weight, pool_bias)
        ctx.save_for_backward(x, u, *linear, *weights)
        request = dispatch.request_of(u, weights, scales)
        arguments = (x, u, weights, scales, gate, *linear)
        return dispatch.run("pyramid_projection", request, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, u, *tensors = ctx.saved_tensors
        linear, weights = tensors[:4], tensors[4:]
        request = dispatch.request_of(u, weights, ctx.scales)
        arguments = (gradient, x, u, weights, ctx.scales, ctx.gate, *linear)
        to_mean, *rest = dispatch.run("pyramid_projection_backward", request, *arguments)
        to_x = (to_mean / (x.shape[1] * x.shape[2])).expand_as(x)
        return None, None, to_x, *rest


def gated_pyramid(u, weights, scales, gate):
    """u [B, H, W, h] → [B, H, W, S · h/2]."""
    return _Pyramid.apply(scales, gate, u, *weights)


def pyramid_projection(x, u, weights, scales, gate, *linear):
    """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C]."""
    return _Projection.apply(scales, gate, x, u, *linear, *weights)
