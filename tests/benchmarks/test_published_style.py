"""The contender in the published style, in Triton's interpreter: all tiles, and the choice."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    # What is decorated while this is set is interpreted; no other test, and no server, inherits it.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed for this system")
from comfyui_deltaconv.benchmarks import published_kernels, published_style

os.environ.pop("TRITON_INTERPRET", None)
from comfyui_deltaconv.benchmarks import check, contenders, layers, published_compile, trial
from comfyui_deltaconv.benchmarks.published_kernels import LINES, SQUARES, TILES
from comfyui_deltaconv.benchmarks.shapes import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
# x [B, H, W, h] and kernel size: several programs with a ragged last one along every axis, maps
# smaller than the tile and than the kernel.
RAGGED = (
    ((2, 9, 5, 40), 5),
    ((1, 34, 3, 36), 3),
    ((1, 3, 43, 66), 3),
    ((1, 1, 3, 262), 3),
    ((1, 5, 4, 6), 7),
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if DEVICE.type == "cpu":
        from triton.runtime.interpreter import interpreter_builder

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        quick = replace(interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter_builder, "options", quick)
    monkeypatch.setattr(published_style, "_chosen", {})


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that torch.empty hands out is full of NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def convolved(x, weight):
    """x [B, H, W, h], weight [k, k, h] → [B, H, W, h], as the definition has it."""
    kernel = weight.permute(2, 0, 1).unsqueeze(1)
    padding, groups = weight.shape[0] // 2, x.shape[-1]
    return F.conv2d(x.movedim(-1, 1), kernel, padding=padding, groups=groups).movedim(1, -1)


def bounds(x, weight, exact, dtype):
    """Largest error of every value: with fp32 products, and with products rounded to `dtype`."""
    unit, taps = torch.finfo(dtype).eps / 2, weight.shape[0] ** 2
    # Half of the smallest number there is, for what is rounded below the normal range.
    tiny = torch.finfo(dtype).smallest_normal * unit
    size = convolved(x.abs(), weight.abs())
    wide = (taps + 1) * 2**-24 * size + unit * exact.abs() + tiny
    return wide, wide + unit * size + taps * tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_is_the_convolution_on_ragged_maps(tile, dtype):
    rounded = False
    for seed, (shape, k) in enumerate(RAGGED):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator).to(dtype)
        weight = torch.randn((k, k, shape[-1]), generator=generator).to(dtype)
        exact = convolved(x.double(), weight.double())
        found = published_kernels.depthwise(x.to(DEVICE), weight.to(DEVICE), tile)
        assert found.dtype == dtype
        error = (found.cpu().double() - exact).abs()
        wide, narrow = bounds(x.double(), weight.double(), exact, dtype)
        assert (error <= (narrow if tile.narrow else wide)).all(), (shape, k)
        rounded |= bool((error > wide).any())
    # The later kernel's products are the map's own, and nobody else's.
    assert rounded == (tile.narrow and dtype is torch.float16)


def test_tiles_are_those_that_the_authors_tune_over():
    assert [(*tile.positions, tile.channels) for tile in SQUARES] == [
        (8, 8, 128),
        (16, 16, 64),
        (8, 8, 256),
        (32, 32, 32),
    ]
    lines = {(*tile.positions, tile.channels) for tile in LINES}
    assert lines == {(n, c) for n in (128, 256) for c in (32, 64, 128)}
    assert len({str(tile) for tile in TILES}) == len(TILES) == 10


@pytest.mark.parametrize(
    "tile, kernel_size, gate",
    [(SQUARES[0], 7, "scaled"), (LINES[0], 7, "scaled"), (LINES[0], 11, "sigmoid")],
    ids=str,
)
def test_the_block_is_right_at_the_bench_with_either_kernel(monkeypatch, tile, kernel_size, gate):
    """16-bit products stay within the budget that every block has there."""
    monkeypatch.setattr(published_style, "choose", lambda *_: published_style.Choice(tile, {}, {}))
    row, dtype = Row("tiny", 64, kernel_size, 8, 2, 8, gate), torch.float16
    x = check.random_input(row, 1, dtype, DEVICE)
    errors = {}
    for name in ("nchw", "pub"):
        contender = contenders.CONTENDERS[name](row, dtype, DEVICE)
        with torch.no_grad():
            errors[name] = check.forward_error(contender, x, contender.run(x))
    assert check.forward_problem("pub", errors["pub"], errors["nchw"], dtype) is None


@pytest.fixture
def three_tiles(monkeypatch):
    """Of these the second is slow and the third fails; what each was called with."""
    tiles, called, right = TILES[:3], [], published_kernels.depthwise

    def depthwise(x, weight, tile, out=None):
        called.append(tile)
        if tile == tiles[2]:
            raise RuntimeError("out of resource: shared memory\nmore of it")
        if tile == tiles[1]:
            time.sleep(0.5)
        return right(x, weight, tile, out)

    monkeypatch.setattr(published_style, "TILES", tiles)
    monkeypatch.setattr(published_style, "REPEATS", 1)
    monkeypatch.setattr(published_style, "depthwise", depthwise)
    return tiles, called


def test_the_fastest_tile_that_runs_is_chosen(three_tiles):
    tiles, _ = three_tiles
    x, weight = torch.randn(1, 3, 3, 4), torch.randn(3, 3, 4)
    choice = published_style._fastest(x, weight)
    assert choice.tile == tiles[0] and set(choice.seconds) == {str(tile) for tile in tiles[:2]}
    assert choice.seconds[str(tiles[1])] >= 0.5 > choice.seconds[str(tiles[0])]
    assert choice.failed == {str(tiles[2]): "RuntimeError: out of resource: shared memory"}


def test_where_no_tile_runs_the_reason_is_raised(three_tiles, monkeypatch):
    monkeypatch.setattr(published_style, "TILES", three_tiles[0][2:])
    with pytest.raises(RuntimeError, match="out of resource"):
        published_style._fastest(torch.randn(1, 3, 3, 4), torch.randn(3, 3, 4))


def test_a_cpu_times_no_tile_and_takes_the_first(three_tiles):
    x, weight = torch.randn(1, 3, 3, 4), torch.randn(3, 3, 4)
    assert published_style.choose(x, weight) == published_style.Choice(TILES[0], {}, {})
    assert not three_tiles[1]


def test_a_shape_is_timed_once(monkeypatch):
    timed = []

    def fastest(x, weight):
        timed.append((tuple(x.shape), weight.shape[0], x.dtype))
        return published_style.Choice(TILES[len(timed)], {}, {})

    monkeypatch.setattr(published_style, "_fastest", fastest)
    shapes = [(1, 4, 4, 8), (1, 4, 4, 8), (1, 4, 8, 8), (1, 4, 4, 8), (2, 4, 4, 8)]
    # Any device but a CPU is timed on; this one has no memory and needs none.
    weight = torch.empty(3, 3, 8, device="meta")
    found = [published_style.choose(torch.empty(shape, device="meta"), weight) for shape in shapes]
    assert [choice.tile for choice in found] == [TILES[n] for n in (1, 1, 2, 1, 3)]
    half = torch.empty(shapes[0], device="meta", dtype=torch.float16)
    published_style.choose(half, torch.empty(3, 3, 8, device="meta", dtype=torch.float16))
    published_style.choose(
        torch.empty(shapes[0], device="meta"), torch.empty(5, 5, 8, device="meta")
    )
    assert len(timed) == len(set(timed)) == 5


def test_the_bench_records_the_tile_of_every_level(monkeypatch, capsys):
    monkeypatch.setattr(trial, "LONGEST_CALL", 1e9)
    row = Row("tiny", 16, 3, 8, 2, 8)
    result = trial.measure_forward(row, 2, torch.float32, CPU, ("nchw", "pub"), 1)
    assert set(result["eager"]) == {"nchw", "pub"} and not result["left_out"]
    levels = result["tiles"]["pub"]
    assert [level["map"] for level in levels] == [[2, 8, 8, 8], [2, 4, 4, 8]]
    assert {level["tile"] for level in levels} == {str(TILES[0])}
    assert all(level["kernel_size"] == 3 and level["seconds"] == {} for level in levels)
    floors = {"floors": {"memory": 1e-6, "arithmetic": None}}
    layers.print_row({"kind": "small", "group": "", **row._asdict(), **floors, **result})
    assert "pub: tiles 8 × 8 × 128 at 8², 8 × 8 × 128 at 4²" in capsys.readouterr().out


def test_every_tile_compiles_for_a_gpu_that_is_not_here():
    """In a process of its own: what is interpreted here cannot be compiled."""
    case = "SD1.5 level 0, k 7"
    line = [sys.executable, "-I", "-m", published_compile.__name__]
    line += ["--target", "sm_90", "--case", case]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [row.split("\t")[2] for row in done.stdout.splitlines()[1:]]
    assert kernels == ["square_kernel"] * len(SQUARES) + ["line_kernel"] * len(LINES)
