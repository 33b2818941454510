"""One public function per op: it picks the implementation that fits the input.

Why Triton cannot run is collected as sentences; torch's operators run then, and the sentences are
logged once. DELTACONV_KERNELS=torch or triton forces one; forced and impossible is an error.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from . import eager
from .reference import GATES, Biases

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_KERNEL = 17
# Positions along one axis are squared in 32-bit integers.
LONGEST_SIDE = 32767
_PROJECTION = ("x", "out_weight", "out_bias", "pool_weight", "pool_bias")

_logged: set[str] = set()
_refused: dict["Request", str] = {}


class Request(NamedTuple):
    """What the choice of an implementation depends on."""

    device: torch.device
    dtype: torch.dtype
    height: int
    width: int
    channels: int
    kernel_size: int
    scales: tuple[float, ...]


def request_of(u: torch.Tensor, weights: Sequence[torch.Tensor], scales) -> Request:
    """u [B, H, W, h] and kernels [k, k, h] → what the choice depends on."""
    _, height, width, channels = u.shape
    size = weights[0].shape[0]
    return Request(u.device, u.dtype, height, width, channels, size, tuple(scales))


@cache
def triton_problem(device_type: str) -> str | None:
    """Why Triton cannot work on that type of device at all; None if it can."""
    try:
        import triton
    except Exception as error:
        return f"Triton cannot be imported ({error})"
    # The interpreter runs kernels in numpy, on any device; it is asked for before the import.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type == "cpu":
        return "the tensors are on the CPU"
    try:
        served = triton.runtime.driver.active.get_active_torch_device().type
    except Exception as error:
        return f"Triton finds no device ({error})"
    return None if served == device_type else f"Triton serves {served} devices, not {device_type}"


def reasons_against_triton(request: Request) -> list[str]:
    """Sentences that say why the Triton kernels cannot take this input; empty when they can."""
    _, dtype, height, width, channels, kernel_size, scales = request
    reasons = [triton_problem(request.device.type)]
    if dtype not in TRITON_DTYPES:
        reasons.append(f"the kernels take fp16, bf16 and fp32, not {dtype}")
    if channels % 2:
        reasons.append(f"the channels must come in two halves, got {channels=}")
    if kernel_size > LARGEST_KERNEL or kernel_size % 2 == 0:
        reasons.append(f"kernels are odd and at most {LARGEST_KERNEL} wide, got {kernel_size=}")
    if scales[0] != 1 or 1 in scales[1:] or len(scales) > 3:
        reasons.append(f"the scales must be 1 and up to two smaller ones, got {scales=}")
    if max(height, width) > LONGEST_SIDE:
        reasons.append(f"a side is at most {LONGEST_SIDE} long, got {height=}, {width=}")
    if request in _refused:
        reasons.append(_refused[request])
    return [reason for reason in reasons if reason]


def forced() -> str | None:
    """The implementation that the environment asks for, if any."""
    return os.environ.get("DELTACONV_KERNELS")


@lru_cache(maxsize=1024)
def uses_triton(request: Request, wanted: str | None) -> bool:
    """Whether the Triton kernels run this; `wanted` is the value of DELTACONV_KERNELS."""
    if wanted not in (None, "", "torch", "triton"):
        raise ValueError(f"Expected DELTACONV_KERNELS to be torch or triton, got {wanted!r}.")
    if wanted == "torch":
        return False
    reasons = reasons_against_triton(request)
    if wanted == "triton":
        if reasons:
            raise RuntimeError(
                f"DELTACONV_KERNELS=triton, but {'; '.join(reasons)}. Unset it to use torch."
            )
        return True
    # The interpreter is for tests: it is right, and thousands of times slower than torch.
    if not reasons and request.device.type == "cpu":
        reasons.append("the tensors are on the CPU")
    if reasons:
        sentence = "; ".join(reasons)
        if sentence not in _logged:
            _logged.add(sentence)
            level = logging.INFO if request.device.type == "cpu" else logging.WARNING
            logging.log(level, "ΔConv: torch operators run, not Triton: %s.", sentence)
    return not reasons


def _device_context(device: torch.device):
    """Triton launches on the current device; this makes it the tensors' own."""
    module = getattr(torch, device.type, None)
    if device.type == "cpu" or device.index in (None, module.current_device()):
        return nullcontext()
    return module.device(device)


def run(op: str, request: Request, *arguments):
    """The op's Triton form where it can run, torch's otherwise; neither records a gradient."""
    if uses_triton(request, forced()):
        from triton import TritonError

        from .fused import backward, forward

        fused = getattr(forward, op, None) or getattr(backward, op)
        try:
            with _device_context(request.device):
                return fused(*arguments)
        except TritonError as error:
            # A device too small for a kernel is not worth a failed picture.
            if forced() == "triton":
                raise
            _refused[request] = f"Triton refused this shape ({type(error).__name__}: {error})"
            uses_triton.cache_clear()
            uses_triton(request, None)
    return getattr(eager, op)(*arguments)


def _records_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


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
    return _call("gated_pyramid", (u,), weights, scales, gate, (), biases)


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
    biases: Biases = (),
) -> torch.Tensor:
    """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C]: a block behind its first projection.

    The gated pyramid of u through `out`, plus the mean of x through `pool`; see
    `pyramid_projection_definition`. All weights are used in the dtype of u. Differentiable in
    every tensor; the gradient is computed from x and u alone, nothing else is kept.
    """
    linear = (out_weight, out_bias, pool_weight, pool_bias)
    check(u, weights, scales, gate, biases, x, linear)
    # Compared first: `to` takes the host longer where there is nothing to do.
    dtype = u.dtype
    linear = tuple([t if t.dtype == dtype else t.to(dtype) for t in linear])
    return _call("pyramid_projection", (x, u), weights, scales, gate, linear, biases)


def _call(op: str, maps: tuple, weights, scales, gate, linear: tuple, biases) -> torch.Tensor:
    """The op on its maps (the last is u), recorded, compiled or neither."""
    present, biased = pack(biases)
    if not torch.compiler.is_compiling():
        arguments = (*maps, weights, scales, gate, *linear, biases if biased else ())
        request = request_of(maps[-1], weights, scales)
        if not _records_gradient(*maps, *weights, *linear, *present):
            return run(op, request, *arguments)
        if not uses_triton(request, forced()):
            return getattr(eager, op)(*arguments)
        from . import autograd

        return getattr(autograd, op)(*arguments)
    # Imported here: telling torch of its operators is a third of the pack's import time.
    from . import custom_ops

    return getattr(custom_ops, op)(*maps, weights, scales, gate, *linear, present, biased)


def pack(biases: Biases) -> tuple[list[torch.Tensor], int]:
    """The biases that are there, and a bit for every scale that has one."""
    if not biases:
        return [], 0
    present = [bias for bias in biases if bias is not None]
    return present, sum(1 << level for level, bias in enumerate(biases) if bias is not None)


def unpack(present: Sequence[torch.Tensor], biased: int, levels: int) -> Biases:
    """The inverse of `pack`; () where no scale has a bias."""
    if not biased:
        return ()
    rest = iter(present)
    return tuple([next(rest) if biased >> level & 1 else None for level in range(levels)])


def check(
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales,
    gate: str,
    biases: Biases = (),
    x: torch.Tensor | None = None,
    linear: Sequence[torch.Tensor] = (),
) -> None:
    """Raises ValueError, with everything that does not fit, before anything is computed.

    With x, also x and `linear`: weight and bias of `out` and of `pool`. This runs before every
    launch, and a kernel reads past the end of what is too small without a word.
    """
    device, dtype = u.device, u.dtype
    size = weights[0].shape[0] if len(weights) and weights[0].ndim else 0
    expected = (size, size, u.shape[-1] if u.ndim else 0)
    fit = u.ndim == 4 and len(weights) == len(scales) and size % 2 == 1 and gate in GATES
    for weight in weights:
        if weight.shape != expected or weight.dtype != dtype or weight.device != device:
            fit = False
    if biases and fit:
        fit = len(biases) == len(scales)
        for bias in biases:
            if bias is not None and (
                bias.shape != expected[2:] or bias.dtype != dtype or bias.device != device
            ):
                fit = False
    if fit and x is not None:
        for tensor, shape in zip((x, *linear), _projection_shapes(u, x, len(scales)), strict=True):
            if tensor.shape != shape or tensor.device != device:
                fit = False
    if fit:
        return
    problems = []
    if u.ndim != 4:
        problems.append(f"u must be [B, H, W, h], got {list(u.shape)}")
    if gate not in GATES:
        problems.append(f"gate must be one of {GATES}, got {gate=}")
    if len(weights) != len(scales) or not len(weights):
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
    if biases and len(biases) != len(scales):
        problems.append(f"expected one bias or None per scale, got {len(biases)} for {scales=}")
    for bias in biases:
        if bias is not None and bias.shape != expected[2:]:
            problems.append(f"biases must be {list(expected[2:])}, got {list(bias.shape)}")
        if bias is not None and (bias.dtype != dtype or bias.device != device):
            problems.append(
                f"expected a bias in {dtype} on {device}, got {bias.dtype} on {bias.device}; "
                "cast it first"
            )
    if x is not None and u.ndim == 4:
        shapes = _projection_shapes(u, x, len(scales))
        for name, tensor, shape in zip(_PROJECTION, (x, *linear), shapes, strict=True):
            if tensor.shape != shape:
                problems.append(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
            if tensor.device != device:
                problems.append(f"expected {name} on {device}, got {tensor.device}; move it first")
    raise ValueError("This pyramid cannot be computed: " + "; ".join(problems) + ".")


def _projection_shapes(u, x, levels: int) -> tuple[tuple[int, ...], ...]:
    """Shapes that x [..., C] and the tensors of both projections must have beside u."""
    batch, height, width, channels = u.shape
    dim = x.shape[-1] if x.ndim else 0
    wide = channels // 2 * levels
    return (batch, height, width, dim), (dim, wide), (dim,), (dim, dim), (dim,)
