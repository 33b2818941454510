"""Compiling for GPUs that are not here: every kernel, and the tiles that such a GPU would get."""

import subprocess
import sys

import pytest
from comfyui_deltaconv.kernels import compile_ahead

# In a process of its own: here the kernels may already stand for their interpreted selves.
COMPILE = """
import sys, torch
from comfyui_deltaconv.kernels import compile_ahead
from comfyui_deltaconv.kernels.accuracy import Case
gate, dtype, target = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]
biased = (0, 1) if gate == "sigmoid" else ()
case = Case(1, 8, 8, 64, 3, gate=gate, biased=biased)
launches = [*compile_ahead.launches(case, dtype, gradients=True)]
launches += compile_ahead.launches(case, dtype, gradients=False, convolution="bands")
for launch in launches:
    text = compile_ahead.compiled_for(launch, dtype, target).asm["ttir"]
    carried = [line.count("xf32>") for line in text.split("\\n") if "scf.for" in line]
    rows = launch.constants.get("ROWS", 0)
    print(launch.kernel.__name__, max(carried, default=0), rows)
"""
KERNELS = {"pool", "gated", "upsample", "gate_gradient", "input_gradient", "weight_gradient"}
KERNELS |= {"downsample", "unpool", "collect", "finish"}


@pytest.mark.parametrize(
    "gate, dtype, target",
    [("scaled", "float16", "sm_90"), ("sigmoid", "float32", "gfx942")],
)
def test_every_kernel_compiles_for_devices_that_are_not_here(gate, dtype, target):
    pytest.importorskip("triton", reason="Triton is not installed for this system")
    line = [sys.executable, "-I", "-c", COMPILE, gate, dtype, target]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loops = {
        name: (int(n), int(rows)) for name, n, rows in map(str.split, done.stdout.splitlines())
    }
    # Bands and their product are for 16 bits.
    wide = dtype == "float32"
    more = set() if wide else {"project", "turn", "bands", "upsample_planes", "project_planes"}
    assert set(loops) == {f"{name}_kernel" for name in KERNELS | more}
    for name in ("gated_kernel", "gate_gradient_kernel", *(["bands_kernel"] * (not wide))):
        # Once a and b were one value to begin with, and a left the loop as zero on every GPU.
        carried, rows = loops[name]
        assert carried >= 2 * rows > 0


PROJECTIONS = """
import sys, torch
from comfyui_deltaconv.kernels import compile_ahead
target, done = sys.argv[1], set()
for case in compile_ahead.CASES.values():
    for launch in compile_ahead.launches(case, torch.float16, False, compile_ahead.SHARED[target]):
        tile = tuple(launch.constants.get(name, 0) for name in ("TOKENS", "OUTPUTS", "INNER"))
        if "project" in launch.kernel.__name__ and tile not in done:
            done.add(tile)
            print(*tile, compile_ahead.compiled_for(launch, torch.float16, target).metadata.shared)
"""


@pytest.mark.parametrize(
    "target, tiles",
    [
        ("sm_90", {(128, 64, 32), (64, 64, 64), (64, 128, 64), (128, 128, 64)}),
        ("gfx942", {(128, 64, 32), (64, 64, 64)}),
    ],
)
def test_what_is_compiled_ahead_is_what_the_device_would_take(target, tiles):
    pytest.importorskip("triton", reason="Triton is not installed for this system")
    line = [sys.executable, "-I", "-c", PROJECTIONS, target]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert {row[:3] for row in rows} == tiles
    for *_, shared in rows:
        assert 0 < shared <= compile_ahead.SHARED[target]
