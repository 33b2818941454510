"""The choice between the Triton kernels and torch's operators, and the call of what was chosen.

Where Triton cannot run, torch's operators do, and the reasons are logged once.
DELTACONV_KERNELS=torch or triton forces one; forced and impossible is an error.
DELTACONV_CONVOLUTION=bands has Triton's forward pass convolve on tensor cores.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from . import eager

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_KERNEL = 17
CONVOLUTIONS = ("rows", "bands")
# Positions along one axis are squared in 32-bit integers.
LONGEST_SIDE = 32767

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
    """Why Triton cannot run on that type of device at all; None if it can."""
    try:
        import triton
    except Exception as error:
        return f"Triton cannot be imported ({error})"
    # The interpreter runs kernels in numpy on any device; it must be set before the import.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type == "cpu":
        return "the tensors are on the CPU"
    try:
        # Any: Triton's base class of drivers declares no result.
        driver: Any = triton.runtime.driver.active
        served = driver.get_active_torch_device().type
    except Exception as error:
        return f"Triton finds no device ({error})"
    return None if served == device_type else f"Triton serves {served} devices, not {device_type}"


def reasons_against_triton(request: Request) -> list[str]:
    """Why the Triton kernels cannot take this input, one sentence each; empty if they can."""
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


def convolution(wanted: str | None = None) -> str:
    """How Triton's forward pass convolves: as `wanted`, or else as the environment says.

    `rows` in registers, or `bands`, products on tensor cores, which 16 bits alone can take. Raises
    ValueError for anything else.
    """
    found = wanted or os.environ.get("DELTACONV_CONVOLUTION") or CONVOLUTIONS[0]
    if found not in CONVOLUTIONS:
        raise ValueError(f"Expected the convolution to be one of {CONVOLUTIONS}, got {found!r}.")
    return found


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
    # The interpreter is for tests: correct, and thousands of times slower than torch.
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
    """Makes the tensors' device the current one, on which Triton launches."""
    if device.type == "cpu":
        return nullcontext()
    module = getattr(torch, device.type)
    if device.index in (None, module.current_device()):
        return nullcontext()
    return module.device(device)


def run(op: str, request: Request, *arguments, **options):
    """The op's Triton form, with `options`, if it can run, else torch's.

    Neither records a gradient.
    """
    if uses_triton(request, forced()):
        from triton import TritonError

        from .fused import backward, forward

        fused = getattr(forward, op, None) or getattr(backward, op)
        try:
            with _device_context(request.device):
                return fused(*arguments, **options)
        except TritonError as error:
            # A device that is too small for a kernel falls back to torch.
            if forced() == "triton":
                raise
            _refused[request] = f"Triton refused this shape ({type(error).__name__}: {error})"
            uses_triton.cache_clear()
            uses_triton(request, None)
    return getattr(eager, op)(*arguments)
