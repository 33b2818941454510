"""Gradients of a site's projection: both passes by launches that were prepared once."""

import threading

import torch
from torch.autograd.function import once_differentiable
from torch.cuda import current_device

from . import autograd
from .reference import Projections

_OP = "pyramid_projection"


class SiteGradients:
    """The backward pass of one site at one shape; prepared anew in every thread that runs it.

    torch's own thread runs it on a GPU, and the addresses of a launch are written in place.
    """

    def __init__(self, scales: tuple[float, ...], gate: str, biased: int):
        self._call = (scales, gate, biased)
        self._prepared: dict = {}

    def __call__(self, gradient: torch.Tensor, tensors: tuple) -> list[torch.Tensor]:
        """The result's gradient → those of the flat tensors; see `autograd`."""
        scales, _, biased = self._call
        thread, x, u = threading.get_ident(), tensors[0], tensors[1]
        prepared = self._prepared.get(thread, 0)
        if prepared and self._fits(gradient, u):
            weights, present = tensors[6 : 6 + len(scales)], iter(tensors[6 + len(scales) :])
            biases = [next(present) if biased >> at & 1 else None for at in range(len(scales))]
            found = prepared(gradient, x, u, weights, biases, Projections._make(tensors[2:6]))
        else:
            found = autograd.run(_OP, tensors, *self._call, gradient=gradient)
            if prepared == 0:
                self._prepare(thread, tensors)
        return autograd.expanded(_OP, found, tensors)

    def _fits(self, gradient: torch.Tensor, u: torch.Tensor) -> bool:
        same = gradient.dtype == u.dtype and u.device.index == current_device()
        return same and gradient.is_contiguous() and gradient.data_ptr() % 16 == 0

    def _prepare(self, thread: int, tensors: tuple) -> None:
        from .fused.direct import direct_backward
        from .fused.forward import shape_of
        from .fused.plan_gradients import plan_gradients

        scales, gate, biased = self._call
        x, u, levels = tensors[0], tensors[1], len(scales)
        weights, present = tensors[6 : 6 + levels], iter(tensors[6 + levels :])
        biases = [next(present) if biased >> at & 1 else None for at in range(levels)]
        shape = shape_of(u, weights, scales, gate, biases if biased else ())
        planned = plan_gradients(shape, x.shape[3], x.dtype)
        self._prepared[thread] = direct_backward(planned, u.device)


class Trained(torch.autograd.Function):
    """A prepared forward pass on x, u and the other flat tensors, with `SiteGradients`."""

    @staticmethod
    def forward(ctx, forward, gradients, x, u, *rest):
        ctx.gradients = gradients
        ctx.save_for_backward(x, u, *rest)
        return forward(x, u)

    @staticmethod
    @once_differentiable
    # torch declares any number of gradients; there is one result.
    def backward(ctx, gradient):  # pyrefly: ignore[bad-override]
        return None, None, *ctx.gradients(gradient, ctx.saved_tensors)
