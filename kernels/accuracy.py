"""Errors of an implementation against the definition in float64, and their budget.

The budget is the error of torch's own operators in the same dtype: a fused kernel rounds less often
and must not be worse.
"""

from typing import NamedTuple

import torch

from .ops import gated_pyramid, pyramid_projection
from .reference import (
    Biases,
    Projections,
    gated_pyramid_definition,
    pyramid_projection_definition,
)


class Case(NamedTuple):
    """One shape of the ops: x [batch, height, width, dim] and its pyramid."""

    batch: int
    height: int
    width: int
    dim: int
    kernel_size: int
    scales: tuple[float, ...] = (1.0, 0.5)
    gate: str = "scaled"
    # Levels whose depthwise convolution has a bias.
    biased: tuple[int, ...] = ()


class Error(NamedTuple):
    """Root mean square and worst distance of `count` values, relative to the exact values' own.

    A NaN anywhere makes both NaN.
    """

    rms: float
    worst: float
    count: int

    def within(self, own: "Error", dtype: torch.dtype) -> bool:
        """Whether this stays within the budget that torch's `own` error sets.

        One rounding of the result is allowed on top: half a unit in the last place at worst, and
        its root mean square. torch's root mean square is an estimate that few values can make small
        by chance, so three of its standard deviations are added.
        """
        unit = torch.finfo(dtype).eps
        likely = own.rms * (1 + 3 / (2 * own.count) ** 0.5)
        # NaN must compare as a failure.
        return self.rms <= 1.5 * likely + unit / 12**0.5 and self.worst <= 2 * own.worst + unit / 2


def distance(value: torch.Tensor, exact: torch.Tensor) -> Error:
    """value in any dtype against `exact` in float64."""
    if value.shape != exact.shape:
        raise ValueError(f"Expected {list(exact.shape)}, got {list(value.shape)}.")
    error, tiny = value.detach().cpu().double() - exact, torch.finfo(torch.float64).tiny
    rms = error.square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(tiny)
    worst = error.abs().max() / exact.abs().max().clamp_min(tiny)
    return Error(rms.item(), worst.item(), exact.numel())


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> list[torch.Tensor]:
    """x, u, out_weight, out_bias, pool_weight, pool_bias, one kernel [k, k, h] per scale, biases.

    Scaled so that activations stay near 1, as after a norm and in a trained block.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan: int = 1) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) / fan**0.5
        return values.to(dtype).to(device)

    batch, height, width, dim, k = case[:5]
    inner = dim // 2
    wide = inner // 2 * len(case.scales)
    gain = (inner // 2) ** 0.25 if case.gate == "scaled" else 1
    kernels = [normal(k, k, inner, fan=k * k) / gain for _ in case.scales]
    return [
        *(normal(batch, height, width, dim), normal(batch, height, width, inner)),
        *(normal(dim, wide, fan=wide), normal(dim)),
        *(normal(dim, dim, fan=dim), normal(dim)),
        *kernels,
        *(normal(inner) / gain for _ in case.biased),
    ]


def project(case: Case, inputs: list[torch.Tensor], op=pyramid_projection) -> torch.Tensor:
    """`op` with the signature of `pyramid_projection` on what `make_inputs` gave."""
    x, u = inputs[:2]
    kernels, biases = kernels_of(case, inputs)
    return op(x, u, kernels, case.scales, case.gate, Projections._make(inputs[2:6]), biases)


def pyramid(case: Case, inputs: list[torch.Tensor], op=gated_pyramid) -> torch.Tensor:
    """`op` with the signature of `gated_pyramid` on what `make_inputs` gave."""
    kernels, biases = kernels_of(case, inputs)
    return op(inputs[1], kernels, case.scales, case.gate, biases)


def kernels_of(case: Case, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], Biases]:
    """The kernels and, by level, the biases among what `make_inputs` gave."""
    behind = 6 + len(case.scales)
    biases = dict(zip(case.biased, inputs[behind:], strict=True))
    by_level = tuple(biases.get(level) for level in range(len(case.scales)))
    return inputs[6:behind], by_level if biases else ()


def exactly(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same numbers in float64 on the CPU."""
    return [tensor.detach().cpu().double() for tensor in inputs]


def forward_errors(
    case: Case, dtype: torch.dtype, device: torch.device | str
) -> list[tuple[str, Error, Error]]:
    """(name, error of the public op, torch's own error) of the pyramid and of the projection."""
    inputs = make_inputs(case, dtype, device)
    with torch.no_grad():
        exact = exactly(inputs)
        gated = pyramid(case, exact, gated_pyramid_definition)
        whole = project(case, exact, pyramid_projection_definition)
        return [
            (
                "pyramid",
                distance(pyramid(case, inputs, gated_pyramid), gated),
                distance(pyramid(case, inputs, gated_pyramid_definition), gated),
            ),
            (
                "block",
                distance(project(case, inputs), whole),
                distance(project(case, inputs, pyramid_projection_definition), whole),
            ),
        ]


NAMES = ("x", "u", "out_weight", "out_bias", "pool_weight", "pool_bias")


def gradient_errors(
    case: Case, dtype: torch.dtype, device: torch.device | str
) -> list[tuple[str, Error, Error]]:
    """(tensor, error of the public op's gradient, torch's own error) for every input."""
    inputs = make_inputs(case, dtype, device)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(dtype).to(device)

    def gradients(tensors, upstream, op):
        tensors = [tensor.requires_grad_() for tensor in tensors]
        return torch.autograd.grad(project(case, tensors, op), tensors, upstream)

    exact = gradients(exactly(inputs), upstream.cpu().double(), pyramid_projection_definition)
    ours = gradients(inputs, upstream, pyramid_projection)
    own = gradients(inputs, upstream, pyramid_projection_definition)
    names = [*NAMES, *(f"kernel {level}" for level in range(len(case.scales)))]
    names += [f"bias {level}" for level in case.biased]
    return [
        (name, distance(a, e), distance(b, e))
        for name, a, b, e in zip(names, ours, own, exact, strict=True)
    ]
