"""The ops as torch custom operators: one node each for torch.compile, with gradients registered.

They take flat tensors, as `autograd` describes them. `ops` calls them only while torch.compile
traces: torch's dispatcher costs more than a small launch.
"""

import torch

from . import autograd, backend

# The maps, projections, kernels and biases behind each other; a bit for every scale with a bias.
_FLAT = "Tensor[] tensors, float[] scales, str gate, int biased"


def _define(name: str, schema: str):
    return torch.library.custom_op(f"deltaconv::{name}", mutates_args=(), schema=schema)


def _defined(op: str, empty_result):
    """The op with fakes and gradient; `empty_result(tensors, levels)` has its result's shape."""

    @_define(op, f"({_FLAT}) -> Tensor")
    def forward(tensors, scales, gate, biased):
        chosen = {"convolution": backend.convolution()} if op == "pyramid_projection" else None
        return autograd.run(op, tensors, scales, gate, biased, options=chosen)

    @forward.register_fake
    def _(tensors, scales, gate, biased):
        return empty_result(tensors, len(scales))

    @_define(f"{op}_backward", f"(Tensor gradient, {_FLAT}) -> Tensor[]")
    def backward(gradient, tensors, scales, gate, biased):
        return autograd.run(op, tensors, scales, gate, biased, gradient)

    @backward.register_fake
    def _(gradient, tensors, scales, gate, biased):
        found = [tensor.new_empty(tensor.shape) for tensor in tensors]
        if op == "pyramid_projection":
            x = tensors[0]
            found[0] = x.new_empty(x.shape[0], 1, 1, x.shape[3])
        return found

    def keep(ctx, inputs, output):
        tensors, *ctx.call = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx, gradient):
        tensors = list(ctx.saved_tensors)
        found = backward(gradient, tensors, *ctx.call)
        return autograd.expanded(op, found, tensors), None, None, None

    forward.register_autograd(gradients, setup_context=keep)
    return forward


def _empty_pyramid(tensors, levels: int):
    u = tensors[0]
    return u.new_empty(*u.shape[:3], u.shape[3] // 2 * levels)


def _empty_projection(tensors, levels: int):
    x, u = tensors[:2]
    return u.new_empty(x.shape)


gated_pyramid = _defined("gated_pyramid", _empty_pyramid)
pyramid_projection = _defined("pyramid_projection", _empty_projection)
