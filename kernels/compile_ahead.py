"""`python -m comfyui_deltaconv.kernels.compile_ahead`: compile kernels for GPUs that are not here.

Per kernel of every launch of the published shapes: seconds it took, registers, bytes spilled per
thread, shared memory, and the instructions that NVIDIA's GPUs would run. Speed needs the GPU.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from .accuracy import Case

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
# Bytes of shared memory that a program may take there.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
# One case per tile and kernel size; sizes alone do not make another compilation.
CASES = {
    "SD1.5 level 0, k 7": Case(2, 64, 64, 320, 7),
    "SD1.5 level 0, k 7, biases": Case(2, 64, 64, 320, 7, biased=(0, 1)),
    "SD1.5 level 0 at 2048², k 11": Case(2, 256, 256, 320, 11),
    "SD1.5 level 2, k 5": Case(2, 16, 16, 1280, 5),
    "SD1.5 middle, k 3": Case(2, 8, 8, 1280, 3),
    "SDXL level 2, k 9": Case(2, 32, 32, 1280, 9),
    "PixArt, k 13": Case(2, 32, 32, 1152, 13, gate="sigmoid"),
    "HunyuanDiT, k 11": Case(2, 64, 64, 1408, 11),
    "Wan 1.3B, k 11": Case(2, 64, 64, 1536, 11),
    "Anima, Cosmos-Predict2, k 11": Case(2, 64, 64, 2048, 11),
    "Wan 2.2 5B, k 11": Case(2, 32, 32, 3072, 11),
    "Wan 14B, k 11": Case(2, 64, 64, 5120, 11),
    "largest kernel, k 17": Case(2, 128, 128, 640, 17),
}
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Report(NamedTuple):
    """One compiled kernel on one target; registers None where no tool reports them."""

    kernel: str
    seconds: float
    registers: int | None
    spilled: int | None
    shared: int
    conversions: int
    # How often each instruction stands in the code, the most frequent ones; not how often it runs.
    instructions: dict[str, int]


def compiled_for(launch, dtype: torch.dtype, target: str):
    """A launch's kernel compiled by Triton, as for a call with aligned tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from .fused.workspace import WIDE

    signature, constants, attributes = {}, dict(launch.constants), {}
    for name in launch.tensors:
        signature[name] = "*fp32" if name in WIDE else f"*{_NAMES[dtype]}"
        if name.startswith("bias") and not launch.constants.get("BIASED"):
            signature[name], constants[name] = "constexpr", None
    for name, number in launch.numbers.items():
        signature[name] = "fp32" if isinstance(number, float) else "i32"
    for name in launch.constants:
        signature[name] = "constexpr"
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        number = launch.numbers.get(name, 0)
        if name in constants or parameter.do_not_specialize or isinstance(number, float):
            continue
        if number == 1:
            signature[name], constants[name] = "constexpr", 1
        elif number % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget(*TARGETS[target]), options=launch.options)


def compile_launch(launch, dtype: torch.dtype, target: str) -> Report:
    """Compiles a launch's kernel and reports on it."""
    start = time.perf_counter()
    compiled = compiled_for(launch, dtype, target)
    seconds = time.perf_counter() - start
    conversions = compiled.asm["ttgir"].count("ttg.convert_layout")
    resources = _resources(compiled.asm)
    name = compiled.metadata.name
    mix = dict(_instructions(compiled.asm).most_common(12))
    return Report(name, seconds, *resources, compiled.metadata.shared, conversions, mix)


def _resources(asm) -> tuple[int | None, int | None]:
    """Registers and spilled bytes of one thread, from the compiler's output."""
    if "amdgcn" in asm:
        # Spills are counted in registers of four bytes.
        pattern = r"\.vgpr_count:\s*(\d+)\s*\.vgpr_spill_count:\s*(\d+)"
        found = re.search(pattern, asm["amdgcn"])
        return (int(found[1]), 4 * int(found[2])) if found else (None, None)
    found = re.search(r"REG:(\d+) STACK:(\d+)", _of_cubin(asm, "cuobjdump", "-res-usage"))
    return (int(found[1]), int(found[2])) if found else (None, None)


def _instructions(asm) -> Counter[str]:
    """Instructions in the code for an NVIDIA GPU, without their modifiers; else nothing."""
    if "cubin" not in asm:
        return Counter()
    pattern = r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_]*)"
    return Counter(re.findall(pattern, _of_cubin(asm, "nvdisasm", "-c"), re.MULTILINE))


def _of_cubin(asm, tool: str, option: str) -> str:
    """What one of the tools that Triton brings says of compiled code; nothing without it."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    if not path.is_file():
        return ""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        return subprocess.run([path, option, cubin], capture_output=True, text=True).stdout


def launches(
    case: Case,
    dtype: torch.dtype,
    gradients: bool,
    shared: int | None = None,
    convolution: str = "rows",
):
    """The launches of `pyramid_projection`, and with `gradients` those of both backward passes.

    `shared`: shared memory in bytes of the device they are for; default: what every device has.
    `convolution`: that of the forward pass.
    """
    from .fused.plan import plan_forward
    from .fused.plan_gradients import plan_gradients, plan_resampling
    from .fused.shape import Shape

    sizes = (case.batch, case.height, case.width, case.dim // 2, case.kernel_size)
    biased = sum(1 << level for level in case.biased)
    rest = (case.scales, case.gate, dtype, torch.device("cpu"), biased)
    shape = Shape(*sizes, *rest, convolution)
    yield from plan_forward(shape, case.dim, dtype, shared).launches
    if gradients:
        steps = plan_gradients(shape, case.dim, dtype).steps
        # One of each kernel: levels differ in their tiles alone.
        yield from {step.launch.kernel.__name__: step.launch for step in reversed(steps)}.values()
        # Of the pyramid without its projection.
        down, unpool = plan_resampling(shape)
        yield from (*down, *([unpool] if unpool else []))


def main(
    argv: list[str] | None = None,
    launches_of: Callable[[Case, torch.dtype, str], Iterable] | None = None,
) -> int:
    """Prints a line per kernel. `launches_of(case, dtype, target)`: by default those of the ops."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=_NAMES.values(), default="fp16")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    if launches_of is None:
        parser.add_argument("--forward-only", action="store_true")
        parser.add_argument("--convolution", choices=("rows", "bands"), default="rows")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("expected to compile, got TRITON_INTERPRET=1. Unset it.")
    dtype = next(dtype for dtype, name in _NAMES.items() if name == options.dtype)

    def of_the_ops(case: Case, dtype: torch.dtype, target: str) -> Iterable:
        gradients = not options.forward_only
        return launches(case, dtype, gradients, SHARED[target], options.convolution)

    columns = ("target", "case", "kernel", "seconds", "registers", "spilled B", "shared B")
    print(*columns, "layout conversions", "instructions", sep="\t")
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache, so that cold compilation is measured.
        os.environ["TRITON_CACHE_DIR"] = cache
        for target in options.target or TARGETS:
            for name in options.case or CASES:
                for launch in (launches_of or of_the_ops)(CASES[name], dtype, target):
                    report = compile_launch(launch, dtype, target)
                    kernel, seconds, *rest, mix = report
                    row = [target, name, kernel, f"{seconds:.1f}", *map(str, rest)]
                    row.append(", ".join(f"{count} {each}" for each, count in mix.items()))
                    print("\t".join(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
