"""Gradients of the ops on flat tensors, recorded for eager calls of the Triton kernels.

Flat: the maps (u, or x and u), the projections if any, all kernels, the biases that are there.
`custom_ops` registers the same gradients for torch.compile; its host overhead is larger than a
kernel's time.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.autograd.function import once_differentiable

from . import backend
from .reference import Biases, Projections


def flatten(
    maps: Sequence[torch.Tensor],
    projections: Projections | None,
    weights: Sequence[torch.Tensor],
    biases: Biases,
) -> tuple[list[torch.Tensor], int]:
    """The flat tensors, and a bit for every scale that has a bias."""
    present = [bias for bias in biases if bias is not None]
    biased = sum(1 << level for level, bias in enumerate(biases) if bias is not None)
    return [*maps, *(projections or ()), *weights, *present], biased


def run(
    op: str,
    tensors: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    biased: int,
    gradient: torch.Tensor | None = None,
    options: Mapping[str, str] | None = None,
):
    """The op on flat tensors; with the gradient of its result, the gradients of all of them.

    `options`: those of the forward pass in Triton.
    x's gradient is [B, 1, 1, C], the same at every position.
    """
    if op == "gated_pyramid":
        maps, rest, linear = tensors[:1], tensors[1:], ()
    else:
        maps, rest, linear = tensors[:2], tensors[6:], (Projections._make(tensors[2:6]),)
    levels = range(len(scales))
    weights, present = rest[: len(levels)], iter(rest[len(levels) :])
    biases = [next(present) if biased >> level & 1 else None for level in levels] if biased else ()
    request = backend.request_of(maps[-1], weights, scales)
    arguments = (*maps, weights, scales, gate, *linear, biases)
    if gradient is None:
        return backend.run(op, request, *arguments, **(options or {}))
    return backend.run(f"{op}_backward", request, gradient, *arguments)


def expanded(op: str, gradients: list[torch.Tensor], tensors: Sequence[torch.Tensor]):
    """What a backward pass gives → gradients of the flat tensors: x's at every position."""
    if op == "gated_pyramid":
        return gradients
    to_x, *rest = gradients
    return [to_x.expand_as(tensors[0]), *rest]


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, scales, gate, biased, options, *tensors):
        ctx.op, ctx.call = op, (scales, gate, biased)
        ctx.save_for_backward(*tensors)
        return run(op, tensors, *ctx.call, options=options)

    @staticmethod
    @once_differentiable
    # torch declares any number of gradients; there is one result.
    def backward(ctx, gradient):  # pyrefly: ignore[bad-override]
        tensors = ctx.saved_tensors
        gradients = run(ctx.op, tensors, *ctx.call, gradient=gradient)
        return None, None, None, None, None, *expanded(ctx.op, gradients, tensors)


def record(
    op: str,
    tensors: Sequence[torch.Tensor],
    scales,
    gate: str,
    biased: int,
    options: Mapping[str, str],
):
    """The op on flat tensors, differentiable in all of them; `options` as in `run`."""
    return _Recorded.apply(op, scales, gate, biased, options, *tensors)
