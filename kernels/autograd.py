"""The ops with their gradients recorded, for eager calls of the Triton kernels.

The same as `operators` has for torch.compile; its custom operators take the host longer than the
kernels run.
"""

import torch
from torch.autograd.function import once_differentiable

from . import backend


class _Pyramid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scales, gate, biased, u, *kernels):
        ctx.scales, ctx.gate, ctx.biased = scales, gate, biased
        ctx.save_for_backward(u, *kernels)
        weights, biases = _split(kernels, biased, len(scales))
        request = backend.request_of(u, weights, scales)
        return backend.run("gated_pyramid", request, u, weights, scales, gate, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        u, *kernels = ctx.saved_tensors
        weights, biases = _split(kernels, ctx.biased, len(ctx.scales))
        request = backend.request_of(u, weights, ctx.scales)
        arguments = (gradient, u, weights, ctx.scales, ctx.gate, biases)
        return None, None, None, *backend.run("gated_pyramid_backward", request, *arguments)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scales, gate, biased, x, u, *tensors):
        ctx.scales, ctx.gate, ctx.biased = scales, gate, biased
        ctx.save_for_backward(x, u, *tensors)
        linear, (weights, biases) = tensors[:4], _split(tensors[4:], biased, len(scales))
        request = backend.request_of(u, weights, scales)
        arguments = (x, u, weights, scales, gate, *linear, biases)
        return backend.run("pyramid_projection", request, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, u, *tensors = ctx.saved_tensors
        linear, (weights, biases) = tensors[:4], _split(tensors[4:], ctx.biased, len(ctx.scales))
        request = backend.request_of(u, weights, ctx.scales)
        arguments = (gradient, x, u, weights, ctx.scales, ctx.gate, *linear, biases)
        to_mean, *rest = backend.run("pyramid_projection_backward", request, *arguments)
        to_x = (to_mean / (x.shape[1] * x.shape[2])).expand_as(x)
        return None, None, None, to_x, *rest


def _split(kernels, biased: int, levels: int):
    """Kernels of all levels, then the biases that are there → kernels, biases by level."""
    return kernels[:levels], backend.unpack(kernels[levels:], biased, levels)


def gated_pyramid(u, weights, scales, gate, biases):
    """u [B, H, W, h] → [B, H, W, S · h/2]."""
    present, biased = backend.pack(biases)
    return _Pyramid.apply(scales, gate, biased, u, *weights, *present)


def pyramid_projection(x, u, weights, scales, gate, *linear_and_biases):
    """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C]."""
    *linear, biases = linear_and_biases
    present, biased = backend.pack(biases)
    return _Projection.apply(scales, gate, biased, x, u, *linear, *weights, *present)
