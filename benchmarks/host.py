"""What one eager call costs the host: microseconds until it returns, and tensors that it makes.

On a small map the device is done before the host has launched the next kernel, so the time of many
calls is the host's. Without a GPU the launches are left out: everything up to the driver's call
runs, and the call itself does nothing.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..deltaconv import DeltaConvBlock
from ..kernels import Projections, pyramid_projection, site, trained
from ..kernels.device import environment
from ..kernels.timing import synchronize
from . import published_style
from .check import random_input
from .contenders import CONTENDERS
from .report_file import ReportFile
from .shapes import Row

# The smallest site of a model, and one whose weights are small too.
ROWS = (Row("SD1.5 middle", 1280, 3, 8, 8, 1280), Row("tiny", 32, 3, 4, 4, 32))
CALLS, ROUNDS = 300, 9


def run(device: torch.device, dtype: torch.dtype, batch: int, file: ReportFile) -> dict:
    """Host time of every way to run a block, as one JSON-ready report; prints it."""
    about = {"dtype": str(dtype).removeprefix("torch."), "batch": batch}
    report = file.open(environment(device) | about)
    on_gpu = device.type == "cuda"
    with nullcontext() if on_gpu else _no_launches():
        # A CPU would compute the first products of the large one.
        for row in ROWS if on_gpu else ROWS[1:]:
            for kind, measure in (("drawing", _measure), ("training", _measure_training)):
                if file.wants(kind=kind, **row._asdict()):
                    about = {"kind": kind} | row._asdict()
                    file.add(about | measure(row, device, dtype, batch))
                    _print(report["results"][-1])
    return report


@torch.inference_mode()
def _measure(row: Row, device: torch.device, dtype: torch.dtype, batch: int) -> dict:
    factory = {"dtype": dtype, "device": device}
    block = DeltaConvBlock(row.dim, row.kernel_size, gate=row.gate, **factory)
    block.requires_grad_(False)
    x = torch.randn(batch, row.side, row.side, row.dim, device=device).to(dtype)
    tokens = x.flatten(1, 2)
    u, (kernels, biases) = block.conv_up(x), block.depthwise_like(x)
    linears = (block.conv_out, block.conv_pool)
    projections = Projections(*(t for each in linears for t in (each.weight, each.bias)))
    rest = (kernels, block.scales, block.gate, projections, biases)
    calls: dict[str, Callable[[], object]] = {
        "block": lambda: block(x),
        "its first product": lambda: torch.nn.functional.linear(
            x, block.conv_up.weight, block.conv_up.bias
        ),
        "the rest, prepared": lambda: block._project(x, u, *rest),
        "the rest, checked and planned": lambda: pyramid_projection(x, u, *rest),
    }
    # Without launches, attention would be computed by the CPU.
    titles = {"pub": "published style", "attn1": "self-attention"}
    for name, title in list(titles.items())[: 2 if device.type == "cuda" else 1]:
        contender = CONTENDERS[name](row, dtype, device)
        calls[title] = lambda run=contender.run: run(tokens)
    for call in calls.values():
        for _ in range(3):
            call()
    (prepared,) = block._project._prepared.values()
    if prepared is not None:
        launch, arguments = prepared[0]._launch, prepared[0]._arguments
        calls["one launch by the driver"] = lambda: launch(*arguments[0])
        calls["four launches by the driver"] = lambda: [launch(*each) for each in arguments]
    return {
        "prepared": prepared is not None,
        "microseconds": _interleaved(calls, device),
        "tensors": {name: _tensors(call) for name, call in calls.items()},
    }


def _measure_training(row: Row, device: torch.device, dtype: torch.dtype, batch: int) -> dict:
    """Forward and backward pass, with the gradients of x and of every weight."""
    # The definition's convolutions have no quick form on a CPU in 16 bits.
    wide = dtype if device.type == "cuda" else torch.float32
    calls = {}
    for title, name, kind in (("block", "ours", dtype), ("torch's operators", "nchw", wide)):
        contender = CONTENDERS[name](row, kind, device)
        x, upstream = (random_input(row, batch, kind, device, seed) for seed in (0, 1))
        inputs = [x.requires_grad_(), *(each.requires_grad_() for each in contender.tensors)]

        def step(run=contender.run, inputs=inputs, upstream=upstream):
            return torch.autograd.grad(run(inputs[0]), inputs, upstream)

        def forward(run=contender.run, x=x):
            return run(x)

        calls |= {title: step, f"{title}, forward": forward}
    for call in calls.values():
        for _ in range(3):
            call()
    about = {"microseconds": _interleaved(calls, device)}
    return about | {"tensors": {name: _tensors(call) for name, call in calls.items()}}


def _interleaved(calls: dict[str, Callable], device: torch.device) -> dict[str, dict]:
    """Name → median, least and most microseconds of a call; every round times all in turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            samples[name].append((time.perf_counter_ns() - start) / CALLS / 1000)
    synchronize(device)
    return {
        name: {"median": statistics.median(found), "low": min(found), "high": max(found)}
        for name, found in samples.items()
    }


class _Counting(TorchDispatchMode):
    """Counts operators of torch that ran, each of which makes a tensor or writes to one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def _tensors(call: Callable) -> int:
    with _Counting() as counting:
        call()
    return counting.count


class _Metadata(NamedTuple):
    num_warps: int = 4
    shared: int = 0


class _Source(NamedTuple):
    signature: dict[str, str]


class _Compiled(NamedTuple):
    function: int
    src: _Source
    metadata: _Metadata = _Metadata()


@contextmanager
def _no_launches() -> Iterator[None]:
    """Within, the Triton path runs on the CPU and every launch does nothing."""
    from ..kernels import backend
    from ..kernels.fused import direct, driver, forward, plan_gradients
    from ..kernels.fused.launch import Launch

    # A function of the C library that takes pointers and returns 0, without doing anything.
    nothing = ctypes.PyDLL(None).pthread_mutexattr_destroy
    nothing.argtypes = (ctypes.c_void_p,) * 4
    signatures: dict[int, list[str]] = {}

    def without_launching(self, tensors):
        """As `Launch` past Triton's lookup, with a run that returns."""
        if self.compiled is None:
            kinds = {}
            for name in self.kernel.arg_names:
                number = self.numbers.get(name)
                kinds[name] = "fp32" if isinstance(number, float) else "i32"
                kinds[name] = "constexpr" if name in self.constants else kinds[name]
                kinds[name] = "*fp16" if name in self.tensors else kinds[name]
            function = 1 + len(signatures)
            signatures[function] = [kind for kind in kinds.values() if kind != "constexpr"]
            self.compiled = _Compiled(function, _Source(kinds))
            pick, tail, programs = self._pick, self.tail, self.programs

            def run(*arguments):
                pass

            def launch(tensors):
                run(programs, 1, 1, 0, function, None, None, None, None, *pick(tensors), *tail)

            self._direct = launch
        self._direct(tensors)

    def sizes(library, function):
        return [8 if kind.startswith("*") else 4 for kind in signatures[function]] + [8, 8]

    class Active:
        """Triton's driver, as far as it is asked for a stream."""

        @staticmethod
        def get_current_stream(index):
            return 0

    from triton.runtime import driver as triton_driver

    threads = torch.get_num_threads()
    with ExitStack() as stack:
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)
        for target, name, value in (
            (Launch, "__call__", without_launching),
            (driver, "parameter_sizes", sizes),
            (direct, "cuda_library", lambda: driver.Library(nothing, nothing)),
            (site, "DEVICES", frozenset({"cpu"})),
            (site, "current_device", lambda: None),
            (trained, "current_device", lambda: None),
            (backend, "triton_problem", lambda device_type: None),
            (type(triton_driver), "active", property(lambda self: Active())),
            # In its favor: Triton's lookup of the kernel is left out, too.
            (published_style, "depthwise", lambda x, weight, tile: torch.empty_like(x)),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(patch.dict("os.environ", {"DELTACONV_KERNELS": "triton"}))
        plans = (forward.plan_forward, plan_gradients.plan_gradients, plan_gradients.plan_level)
        for cached in (*plans, backend.uses_triton):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield


def _print(entry: dict) -> None:
    about = f"{entry['name']}, C={entry['dim']}, {entry['kind']}"
    print(f"{about}, µs of the host until a call returns:")
    for name, timing in entry["microseconds"].items():
        operators = entry["tensors"][name]
        print(f"    {name}: {timing['median']:.1f} ({operators} operators of torch)", flush=True)
