"""The public ops: each checks its tensors, then runs recorded, compiled or neither."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from . import autograd, backend, eager
from .reference import GATES, Biases, Projections

_PROJECTED = ("x", *Projections._fields)
NOTHING: Mapping[str, str] = MappingProxyType({})


def gated_pyramid(
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    biases: Biases = (),
) -> torch.Tensor:
    """u [B, H, W, h], one kernel [k, k, h] per scale → [B, H, W, len(scales) · h/2].

    Depthwise convolution and gate over all scales, with pooling and upsampling; see
    `gated_pyramid_definition`. `biases` has one [h] or None per scale, or nothing at all.
    Differentiable in u, kernels and biases.
    """
    check(u, weights, scales, gate, biases)
    return _call("gated_pyramid", (u,), weights, scales, gate, None, biases)


def pyramid_projection(
    x: torch.Tensor,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    projections: Projections,
    biases: Biases = (),
    convolution: str | None = None,
) -> torch.Tensor:
    """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C]: a block behind its first projection.

    The gated pyramid of u through `out`, plus the mean of x through `pool`; see
    `pyramid_projection_definition`. All weights are used in the dtype of u. Differentiable in
    every tensor; only x and u are kept for the backward pass. `convolution`: see
    `backend.convolution`; torch.compile takes the environment's.
    """
    check(u, weights, scales, gate, biases, x, projections)
    dtype = u.dtype
    # Check dtype first: `.to()` has host overhead even as a no-op.
    if any([tensor.dtype != dtype for tensor in projections]):
        projections = Projections._make([tensor.to(dtype) for tensor in projections])
    chosen = {"convolution": backend.convolution(convolution)}
    return _call("pyramid_projection", (x, u), weights, scales, gate, projections, biases, chosen)


def _call(
    op: str,
    maps: tuple[torch.Tensor, ...],
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    projections: Projections | None,
    biases: Biases,
    options: Mapping[str, str] = NOTHING,
) -> torch.Tensor:
    """The op on its maps, the last of which is u; `options` are those of its Triton form."""
    if not any([bias is not None for bias in biases]):
        biases = ()
    if torch.compiler.is_compiling():
        # Imported here: defining torch's operators is a third of the pack's import time.
        from . import custom_ops

        tensors, biased = autograd.flatten(maps, projections, weights, biases)
        return getattr(custom_ops, op)(tensors, scales, gate, biased)
    linear = () if projections is None else (projections,)
    arguments = (*maps, weights, scales, gate, *linear, biases)
    request = backend.request_of(maps[-1], weights, scales)
    if not torch.is_grad_enabled():
        return backend.run(op, request, *arguments, **options)
    tensors, biased = autograd.flatten(maps, projections, weights, biases)
    if not any([tensor.requires_grad for tensor in tensors]):
        return backend.run(op, request, *arguments, **options)
    if not backend.uses_triton(request, backend.forced()):
        # torch records its own operators.
        return getattr(eager, op)(*arguments)
    return autograd.record(op, tensors, scales, gate, biased, options)


def check(
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    biases: Biases = (),
    x: torch.Tensor | None = None,
    projections: Projections | None = None,
) -> None:
    """Raises ValueError with every reason why the tensors do not fit.

    Runs before every launch: a kernel silently reads past the end of a tensor that is too small.
    """
    problems = []
    device, dtype, levels = u.device, u.dtype, len(scales)
    size = weights[0].shape[0] if len(weights) and weights[0].ndim else 0
    expected = (size, size, u.shape[-1] if u.ndim else 0)
    if u.ndim != 4:
        problems.append(f"u must be [B, H, W, h], got {list(u.shape)}")
    if gate not in GATES:
        problems.append(f"gate must be one of {GATES}, got {gate=}")
    if len(weights) != levels or not levels:
        problems.append(f"expected one kernel per scale, got {len(weights)} for {scales=}")
    for weight in weights:
        if weight.shape != expected or size % 2 == 0:
            odd = "" if size % 2 else " with an odd k"
            problems.append(f"kernels must be {list(expected)}{odd}, got {list(weight.shape)}")
        if weight.dtype != dtype or weight.device != device:
            problems.append(
                f"expected a kernel in {dtype} on {device}, got {weight.dtype} on "
                f"{weight.device}; cast it first"
            )
    if biases and len(biases) != levels:
        problems.append(f"expected one bias or None per scale, got {len(biases)} for {scales=}")
    for bias in biases:
        if bias is None:
            continue
        if bias.shape != expected[2:]:
            problems.append(f"biases must be {list(expected[2:])}, got {list(bias.shape)}")
        if bias.dtype != dtype or bias.device != device:
            problems.append(
                f"expected a bias in {dtype} on {device}, got {bias.dtype} on {bias.device}; "
                "cast it first"
            )
    if x is not None and projections is not None and u.ndim == 4:
        batch, height, width, channels = u.shape
        dim = x.shape[-1] if x.ndim else 0
        wide = channels // 2 * levels
        shapes = (batch, height, width, dim), (dim, wide), (dim,), (dim, dim), (dim,)
        for name, tensor, shape in zip(_PROJECTED, (x, *projections), shapes, strict=True):
            if tensor.shape != shape:
                problems.append(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
            if tensor.device != device:
                problems.append(f"expected {name} on {device}, got {tensor.device}; move it first")
    if problems:
        raise ValueError("This pyramid cannot be computed: " + "; ".join(problems) + ".")
