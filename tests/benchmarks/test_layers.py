"""The benchmark on a CPU: what it measures, what it refuses, and what becomes of its JSON."""

import json
import os
from pathlib import Path

import pytest
import torch
from comfyui_deltaconv.benchmarks import check, contenders, cpu_step, layers, plot, shapes, trial
from comfyui_deltaconv.benchmarks.report_file import ReportFile
from comfyui_deltaconv.benchmarks.shapes import Row
from comfyui_deltaconv.cli.__main__ import main
from comfyui_deltaconv.deltaconv import flops
from comfyui_deltaconv.deltaconv.geometry import BlockGeometry
from comfyui_deltaconv.kernels import timing
from comfyui_deltaconv.kernels.accuracy import distance

CPU = torch.device("cpu")
TINY = (Row("tiny", 16, 3, 8, 2, 8), Row("tiny", 16, 3, 12, 2, 8, "sigmoid"))


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """No call is too long, however busy the machine is."""
    monkeypatch.setattr(trial, "LONGEST_CALL", 1e9)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of two tiny rows, through the command."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "SMALL", TINY)
        patch.setattr(trial, "LONGEST_CALL", 1e9)
        patch.setattr(layers, "copy_bandwidth", lambda device: 1e10)
        assert main(["bench", "--device", "cpu", "--repeats", "3", "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_row_is_measured_with_its_spread(report):
    forward = [entry for entry in report["results"] if entry["kind"] == "small"]
    assert [entry["side"] for entry in forward] == [8, 12]
    for entry in forward:
        assert {"attn1", "linfus", "nchw", "nhwc", "ours"} <= entry["eager"].keys()
        assert not any("WRONG" in reason for reason in entry["left_out"].values())
        for seconds in entry["eager"].values():
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
            assert seconds["samples"] == 3
    training = [entry for entry in report["results"] if entry["kind"] == "training"]
    assert len(training) == 2 and all(entry["saved"]["ours"] > 0 for entry in training)
    assert report["environment"]["torch"] == torch.__version__


def test_table_and_plot_come_from_the_json(report, tmp_path):
    text = plot.table(report)
    assert text.count("| tiny | 16 | 3 | 8 |") == 2 and "ours / floor" in text
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    plot.draw(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["training", "models", "rows"])
def test_one_part_alone_has_a_table_and_a_plot(kind, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layers, "ROWS", TINY[:1])
    monkeypatch.setattr(layers, "SWEEP", TINY[:1])
    monkeypatch.setattr(layers, "MODELS", {"a model": ((TINY[0], 3),)})
    monkeypatch.setattr(layers, "copy_bandwidth", lambda device: 1e10)
    path = tmp_path / "report.json"
    main(["bench", "--device", "cpu", "--repeats", "1", "--only", kind, "--json", str(path)])
    found = json.loads(path.read_text(encoding="utf-8"))
    expected = {"training": ["training", "training sweep"]}.get(kind, [kind])
    assert [entry["kind"] for entry in found["results"]] == expected
    assert found["seconds"] > 0
    capsys.readouterr()
    assert plot.main([str(path), "--table"]) == 0
    text = capsys.readouterr().out
    site = {"models": "a model tiny (3 ×)"}.get(kind, "tiny")
    assert f"| {site} | 16 | 3 | 8 |" in text
    if kind == "training":
        assert "Forward and backward" in text and "| SD1.5 at tiny | 16 |" in text
        kept = [
            entry["saved"][name] / 2**20 for entry in found["results"] for name in ("nchw", "ours")
        ]
        assert f"{kept[0]:.1f} → {kept[1]:.1f}" in text
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    plot.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_distance_to_the_floor_adds_up(report, capsys):
    assert "nothing to explain" in plot.explain(report)
    # 2 C of floor and 5⅞ C of traffic, at a byte a second: x and y of 2 × 4 tokens of 16 bytes.
    about = {"batch": 2, "dtype": "float16", "copy_bytes_per_second": 1.0}
    entry = {"kind": "rows", "group": "", "name": "a", "dim": 8, "kernel_size": 3, "eager": {}}
    small = entry | {"side": 1, "floors": {"memory": 2.0, "arithmetic": 1.0}}
    large = entry | {"side": 2, "floors": {"memory": 256.0, "arithmetic": None}}
    small["graph"], large["graph"] = ({"ours": {"median": value}} for value in (5.0, 1000.0))
    lines = plot.explain({"environment": about, "results": [small, large]}).split("\n")
    parts = [float(cell.replace(" ", "")) for cell in lines[3].split(" | ")[3:8]]
    # 3 of launches, 256 + 3.875 · 2 · 4 · 8 · 2 of bytes.
    assert parts == [1000e6, 3e6, 752e6, 0, 245e6] and lines[3].endswith("| bytes |")


def test_a_report_without_layers_has_no_table(tmp_path, capsys):
    path = tmp_path / "flops.json"
    main(["bench", "--flops", "--json", str(path)])
    with pytest.raises(SystemExit):
        plot.main([str(path)])
    assert "expected results of layers" in capsys.readouterr().err


def test_the_readme_has_the_tables_that_the_committed_json_gives(capsys):
    folder = Path(layers.__file__).parent
    readme = (folder / "README.md").read_text(encoding="utf-8")

    def read(name):
        return json.loads((folder / "results" / name).read_text(encoding="utf-8"))

    found, earlier = read("h200.json"), read("h100.json")
    earlier["results"] = [entry for entry in earlier["results"] if entry["kind"] == "sweep"]
    tables = [part for part in plot.table(found).split("\n\n") if part.startswith("| site")]
    assert [table.count("\n") for table in tables] == [13, 10, 4]
    for table in (*tables, plot.explain(found), plot.table(earlier).split("\n\n")[1]):
        assert table in readme
    assert plot.main([str(folder / "results" / "h200_models.json")]) == 0
    assert capsys.readouterr().out.strip() in readme


@pytest.mark.parametrize("what", [["--flops"], ["--comfyui", "nowhere"], []])
def test_a_folder_that_is_not_there_is_refused_before_anything_runs(what, tmp_path, capsys):
    assert main(["bench", *what, "--json", str(tmp_path / "none" / "x.json")]) == 1
    assert "Expected --json in a folder that exists" in capsys.readouterr().err


def test_what_is_too_slow_in_a_sweep_is_not_tried_at_larger_sizes(monkeypatch):
    monkeypatch.setattr(layers, "SWEEP", TINY)
    monkeypatch.setattr(layers, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(trial, "LONGEST_CALL", 0.0)
    found = layers.run(CPU, torch.float32, 1, 1, ["sweep"], ReportFile())["results"]
    assert found[0]["left_out"]["ours"].startswith("one call takes")
    assert found[1]["left_out"]["ours"].startswith("not tried: at tiny one call takes")


def broken(monkeypatch, spoil):
    """`ours` gives what `spoil` makes of its result."""
    right = contenders.CONTENDERS["ours"]

    def wrong(*arguments):
        contender = right(*arguments)
        return contender._replace(run=lambda x: spoil(contender.run(x)))

    monkeypatch.setitem(contenders.CONTENDERS, "ours", wrong)


def zero_between(y, first=1600, last=None):
    """y [B, N, C] without the tokens from `first` to `last`, where there are so many."""
    y = y.clone()
    y[:, first:last] = 0
    return y


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


@pytest.mark.parametrize(
    ("side", "spoil"),
    [
        (8, lambda y: y * 1.001),
        (41, lambda y: zero_between(y) if y.shape[1] > 1600 else y),
        (41, zero_between),
        # Beyond the windows that float64 looks at: row 20 of 64.
        (64, lambda y: zero_between(y, 20 * 64, 20 * 64 + 16)),
        # The last token of the last image.
        (64, lambda y: torch.cat([y[:1], zero_between(y[1:], 4095)])),
        (64, lambda y: y * float("nan")),
    ],
)
def test_a_wrong_result_gets_no_time(monkeypatch, side, spoil):
    broken(monkeypatch, spoil)
    row = TINY[0]._replace(side=side)
    result = trial.measure_forward(row, 2, torch.float32, CPU, ("nchw", "ours"), 1)
    assert list(result["eager"]) == ["nchw"]
    assert "WRONG RESULT, not timed" in result["left_out"]["ours"]


@pytest.mark.parametrize("side", [8, 41])
def test_a_wrong_gradient_gets_no_time(monkeypatch, side):
    large = {"only above 400 tokens": lambda y: WithoutGradient.apply(y) if y.shape[1] > 400 else y}
    for spoil in (WithoutGradient.apply, *(large.values() if side == 41 else ())):
        with monkeypatch.context() as patch:
            broken(patch, spoil)
            row = TINY[0]._replace(side=side)
            result = trial.measure_training(row, 2, torch.float32, CPU, ("nchw", "ours"), 1)
        assert list(result["eager"]) == list(result["saved"]) == ["nchw"]
        assert "WRONG GRADIENT of x, not timed" in result["left_out"]["ours"]


@pytest.mark.parametrize(
    ("dtype", "side"), [(torch.float32, 41), (torch.float32, 64), (torch.float16, 34)]
)
def test_nothing_right_is_called_wrong(dtype, side):
    for row in (TINY[0], TINY[1]._replace(kernel_size=13)):
        row = row._replace(side=side)
        names = ("attn1", "linfus", "nchw", "nhwc", "ours")
        assert not trial.measure_forward(row, 2, dtype, CPU, names, 1)["left_out"]
        assert not trial.measure_training(row, 2, dtype, CPU, names[2:], 1)["left_out"]


@pytest.mark.parametrize("name", ["attn1", "linfus", "nchw"])
def test_a_window_is_that_part_of_the_whole(name):
    row = Row("tiny", 16, 7, 64, 2, 8)
    contender = contenders.CONTENDERS[name](row, torch.float32, CPU)
    x = check.random_input(row, 2, torch.float32, CPU)
    whole = contender.exact(x.double())
    for window in check.windows(row.side):
        error = distance(contender.at(x, window), window.of(whole))
        assert error.worst < 1e-12, window


def test_a_contender_without_memory_is_said_and_the_rest_goes_on(monkeypatch):
    def spoil(y):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB")

    broken(monkeypatch, spoil)
    for measured in (trial.measure_forward, trial.measure_training):
        result = measured(TINY[0], 1, torch.float32, CPU, ("nchw", "ours"), 1)
        assert result["left_out"] == {"ours": "out of memory"} and list(result["eager"]) == ["nchw"]


def test_attention_is_attention():
    contender = contenders.CONTENDERS["attn1"](TINY[0], torch.float32, CPU)
    x = check.random_input(TINY[0], 2, torch.float64, CPU)
    state = contender.exact.state_dict()
    q, k, v = ((x @ state[f"to_{n}.weight"].T).unflatten(-1, (2, 8)) for n in "qkv")
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
    expected = mixed @ state["to_out.weight"].T + state["to_out.bias"]
    assert distance(contender.exact(x), expected).worst < 1e-12


def test_linfusion_is_its_formula():
    row = TINY[0]
    module = contenders.CONTENDERS["linfus"](row, torch.float32, CPU).exact
    x = check.random_input(row, 1, torch.float64, CPU)
    q = torch.nn.functional.elu(module.to_q(x + module.add_q(x))) + 1
    k = torch.nn.functional.elu(module.to_k(x + module.add_k(x))) + 1
    v = module.to_v(x)
    expected = torch.zeros_like(x)
    for head in (slice(0, 8), slice(8, 16)):
        a, b, c = q[0, :, head], k[0, :, head], v[0, :, head]
        for i in range(row.tokens):
            # One query at a time: weights over all keys, normalised by their mean.
            weights = b @ a[i] / row.tokens
            expected[0, i, head] = weights @ c / (a[i] @ b.mean(0) + 1e-4)
    assert distance(module(x), module.to_out(expected)).worst < 1e-12


def test_models_have_their_number_of_sites():
    counts = {name: sum(n for _, n in sites) for name, sites in shapes.MODELS.items()}
    assert counts == {"SD1.5 at 512²": 16, "SDXL at 1024²": 70}


def test_floors_count_what_must_be_done():
    row = Row("", 320, 7, 64, 8, 320)
    # As in the table this benchmark is judged by: 3.6 µs at 3006 GB/s, batch 2, fp16.
    assert shapes.floors(row, 2, 2, 3006e9, None)["memory"] == pytest.approx(3.6e-6, rel=0.02)
    assert shapes.depthwise_flops(row, 2) == 2 * 160 * 49 * 64 * 64 * 2 * 1.25


def test_saved_memory_leaves_out_what_the_caller_owns():
    x = torch.randn(100, requires_grad=True)
    assert timing.saved_for_backward(lambda: x * x, [x]) == 0
    assert timing.saved_for_backward(lambda: (x + 1).exp(), [x]) == 400


def test_flops_place_the_papers_headline(capsys, tmp_path):
    path = tmp_path / "flops.json"
    assert main(["bench", "--flops", "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))["flops"]
    assert [row["pixels"] for row in found] == [512, 1024, 2048, 4096, 8192, 16384]

    def by_hand(pixels):
        """Multiply-adds, twice: (C, kernel, sites, tokens), level by level as SD1.5 has them."""
        cells = (pixels // 8) ** 2
        attention = blocks = 0
        for dim, k, sites, tokens in (
            (320, 7, 2, cells),
            (320, 11, 3, cells),
            (640, 9, 5, cells // 4),
            (1280, 5, 5, cells // 16),
            (1280, 3, 1, cells // 64),
        ):
            # q, k, v and the way out; Q·Kᵀ and the weighted sum.
            attention += sites * (4 * tokens * dim**2 + 2 * tokens**2 * dim)
            # Up and out; taps of both scales on half the channels; the pooled branch.
            up, out = tokens * dim * dim // 2, tokens * (2 * dim // 4) * dim
            taps = (tokens + tokens // 4) * k**2 * dim // 2
            blocks += sites * (up + out + taps + dim**2)
        return 2 * attention, 2 * blocks

    for row in found:
        assert (row["attention"], row["deltaconv"]) == by_hand(row["pixels"])
    assert by_hand(512) == (173_665_157_120, 13_956_608_000)
    readme = (Path(layers.__file__).parent / "README.md").read_text(encoding="utf-8")
    for row in found:
        ratio = f"{row['attention'] / row['deltaconv']:,.0f}".replace(",", " ")
        cells = (f"{row['pixels']}²", f"{row['attention']:.3g}", f"{row['deltaconv']:.3g}", ratio)
        assert "| " + " | ".join(cells) + " |" in readme
    assert "16384²" in capsys.readouterr().out


def test_the_headline_is_recomputed_from_the_papers_own_formula(capsys, tmp_path):
    path = tmp_path / "flops.json"
    assert main(["bench", "--flops", "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))["headline"]
    by_size = {tuple(row["pixels"]): row for row in found}
    largest = by_size[15360, 8640]
    # n = 1920 · 1080 tokens of 640 channels: 4nC² + 4n²C + 4nC, in digits.
    assert largest["tokens"] == 2_073_600
    assert largest["paper"] == 3_397_386_240_000 + 11_007_531_417_600_000 + 5_308_416_000
    assert f"{largest['paper'] / 1e9:,.2f}" == "11,010,934.11"
    assert round(largest["paper"] / flops.PAPER_BLOCK_OPERATIONS) == 6929
    digits = {(512, 512): "49.67", (1024, 1024): "714.08", (3840, 2160): "43,210.84"}
    for pixels, wanted in digits.items():
        assert f"{by_size[pixels]['paper'] / 1e9:,.2f}" == wanted
    # Ours: two operations to a multiply-add on both sides.
    n, c = 2_073_600, 640
    assert largest["attention"] == 2 * (4 * n * c**2 + 2 * n**2 * c)
    assert largest["deltaconv"] == 2 * (n * c**2 + c**2 + (n + n // 4) * 320 * 81)
    readme = (Path(layers.__file__).parent / "README.md").read_text(encoding="utf-8")
    for row in found:
        across, down = row["pixels"]
        cells = [f"{across}²" if across == down else f"{across} × {down}"]
        cells += [f"{row['tokens']:,}"]
        cells += [f"{row[name] / 1e9:,.2f} G" for name in ("paper", "attention", "deltaconv")]
        cells += [f"{row['attention'] / row['deltaconv']:,.0f}"]
        assert ("| " + " | ".join(cells) + " |").replace(",", " ") in readme
    assert "11010934.11 G" in (said := capsys.readouterr().out) and "6929 ×" in said


def test_fewer_operations_than_linfusion_are_counted_and_not_timed():
    ratios = {}
    for row in shapes.ROWS:
        geometry = BlockGeometry(row.dim, row.kernel_size, 2)
        block = flops.block_flops(geometry, shapes.SCALES, row.side, row.side)
        other = flops.linfusion_flops(row.dim, row.heads, row.linfusion, row.tokens)
        ratios.setdefault(row.name.split()[0], []).append(other / block)
    row = shapes.ROWS[0]
    # Multiply-adds of a token: q, k, v, out; two networks there and back; kᵀv and q·kᵀv by head.
    by_hand = 4 * 320**2 + 2 * 2 * 320 * 320 + 2 * 320 * 40
    assert flops.linfusion_flops(320, 8, 320, row.tokens) == 2 * 4096 * by_hand
    small, large = ratios["SD1.5"], ratios["SDXL"] + ratios["PixArt"]
    said = f"{min(small):.1f} to {max(small):.1f} × at SD1.5's rows, "
    said += f"{min(large):.1f} to {max(large):.1f} × at SDXL's and PixArt's"
    readme = (Path(layers.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert said in readme
    # The paper's 5.42 is such a count; no row of times may be held against it.
    other = (Path(layers.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    lines = [line for line in (readme + other).split("\n") if "5.42" in line]
    assert len(lines) > 3 and all("operations" in line for line in lines)


def test_the_demos_blocks_are_timed_against_how_they_were_first_written(
    tmp_path, capsys, monkeypatch
):
    path = tmp_path / "step.json"
    line = ["bench", "--cpu-step", "--repeats", "1", "--batch", "1", "--json", str(path)]
    assert main(line) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["blocks"] == 10 and found["environment"]["load"]
    assert set(found["times"]) == {cpu_step.NOW, cpu_step.FIRST, cpu_step.TOKENS}
    assert {timing["samples"] for timing in found["times"].values()} == {1}
    assert "load average" in capsys.readouterr().out
    # Windows has none.
    monkeypatch.delattr(os, "getloadavg")
    cpu_step.run(1, 1, path)
    assert json.loads(path.read_text(encoding="utf-8"))["environment"]["load"] is None
    assert "load average" not in capsys.readouterr().out
    monkeypatch.setattr(cpu_step, "first_written", lambda block, x: x)
    assert main(line) == 1
    assert "nothing was timed" in capsys.readouterr().err
