"""All benchmarks in one command: files, going on after a cut, and the host's own time."""

import json
import os

import pytest
import torch
from comfyui_deltaconv.benchmarks import BenchmarkError, layers, trial
from comfyui_deltaconv.benchmarks.report_file import ReportFile
from comfyui_deltaconv.benchmarks.shapes import Row
from comfyui_deltaconv.cli.__main__ import main
from comfyui_deltaconv.kernels import backend, timing

if not torch.cuda.is_available():
    # What is decorated while this is set is interpreted: other tests of this process run it.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed for this system")
from comfyui_deltaconv.benchmarks import convolutions, everything, host, models
from comfyui_deltaconv.kernels.fused import forward, plan_bands  # noqa: F401 (decorated here)

os.environ.pop("TRITON_INTERPRET", None)

CPU = torch.device("cpu")
TINY = (Row("tiny", 16, 3, 8, 2, 16), Row("tiny", 16, 3, 12, 2, 16))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(layers, "SMALL", TINY)
    monkeypatch.setattr(layers, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(trial, "LONGEST_CALL", 1e9)
    monkeypatch.setattr(host, "CALLS", 3)
    monkeypatch.setattr(host, "ROUNDS", 3)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_cut_run_goes_on_and_measures_nothing_twice(tiny, tmp_path, capsys):
    line = ["bench", "--device", "cpu", "--everything", str(tmp_path)]
    assert main([*line, "--seconds", "0"]) == 0
    assert read(tmp_path / "host.json")["cut"] and not read(tmp_path / "host.json")["results"]
    assert read(tmp_path / "layers.json")["cut"]
    assert main(line) == 0
    first = {path.name: read(path) for path in tmp_path.glob("*.json")}
    assert set(first) == {"host.json", "layers.json"}
    kinds = [entry["kind"] for entry in first["layers.json"]["results"]]
    assert kinds == ["small", "small", "training", "training"]
    assert not any("cut" in report for report in first.values())
    # A file from which one result was lost gets that one alone.
    lost = read(tmp_path / "layers.json")
    gone = lost["results"].pop(1)
    (tmp_path / "layers.json").write_text(json.dumps(lost), encoding="utf-8")
    assert main(line) == 0
    again = read(tmp_path / "layers.json")
    assert again["results"][:-1] == lost["results"]
    assert {k: again["results"][-1][k] for k in ("kind", "name")} == {
        k: gone[k] for k in ("kind", "name")
    }
    assert read(tmp_path / "host.json") == first["host.json"]


def test_a_report_of_another_device_is_not_gone_on_with(tmp_path):
    path = tmp_path / "report.json"
    file = ReportFile(path)
    file.open({"device": "one"})
    file.add({"name": "a"})
    assert not ReportFile(path).report["results"]
    resumed = ReportFile(path, resume=True)
    resumed.open({"device": "one"})
    assert not resumed.wants(name="a") and resumed.wants(name="b")
    with pytest.raises(BenchmarkError, match=r"to be of device two, as this run is, got one"):
        ReportFile(path, resume=True).open({"device": "two"})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--everything", "missing"], "Expected --everything to be a folder that exists"),
        (["--resume"], "Expected --json with --resume"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(options, sentence, tmp_path, capsys):
    options = [str(tmp_path / each) if each == "missing" else each for each in options]
    assert main(["bench", "--device", "cpu", *options]) == 1
    assert sentence in capsys.readouterr().err


def test_the_host_prepares_its_launches_where_it_can(tiny, capsys):
    report = host.run(CPU, torch.float16, 2, ReportFile())
    entry, training = report["results"]
    assert entry["prepared"]
    # The first product, the result and the working memory: nothing else is made.
    assert entry["tensors"]["block"] == 3 and entry["tensors"]["published style"] > 15
    assert entry["tensors"]["four launches by the driver"] == 0
    # Torch's operators run where launches would, and each takes the host as long as a launch.
    assert training["kind"] == "training"
    assert training["tensors"]["block"] <= 36 < 90 < training["tensors"]["torch's operators"]
    for found in (*entry["microseconds"].values(), *training["microseconds"].values()):
        assert 0 <= found["low"] <= found["median"] <= found["high"]
    assert "µs of the host" in capsys.readouterr().out


@pytest.fixture
def interpreted(monkeypatch):
    """Triton or an error, in its interpreter."""
    monkeypatch.setenv("DELTACONV_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cached = (backend.uses_triton, backend.triton_problem)
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


def test_both_convolutions_are_timed_launch_by_launch_and_checked(
    tiny, interpreted, monkeypatch, capsys
):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    row = Row("tiny", 8, 3, 4, 2, 8)
    monkeypatch.setattr(convolutions, "TUNED", (row,))
    monkeypatch.setattr(plan_bands, "TRIED", plan_bands.TRIED[2:3])
    file = ReportFile()
    report = convolutions.run(CPU, torch.float16, 1, 1, file, (row,))
    (entry,) = report["results"]
    assert entry["eager"].keys() == {"nchw", "ours", "bands"} and not entry["left_out"]
    rows, *bands = entry["launches"].values()
    assert "gated_kernel" in rows["seconds"] and len(bands) == 2
    for each in bands:
        assert each["apart"] < 1e-3 and each["seconds"]["bands_kernel"]["samples"] == 1
    assert not file.wants(**row._asdict())
    # A result that is off has no time.
    monkeypatch.setattr(convolutions, "TUNED", ())
    monkeypatch.setattr(convolutions, "measure_forward", lambda *a: {"left_out": {}})
    monkeypatch.setattr(convolutions, "tiles_apart", lambda value, reference: float("nan"))
    found = convolutions.run(CPU, torch.float16, 1, 1, ReportFile(), (row,))["results"][0]
    assert {each["failed"] for each in found["launches"].values()} == {"WRONG RESULT, not timed"}
    assert "WRONG RESULT" in capsys.readouterr().out


def test_on_a_gpu_the_parts_come_in_order_of_value(tmp_path, monkeypatch):
    order = []
    for part in (convolutions, host, models, layers, everything.first_call):
        name = part.__name__.split(".")[-1]

        def noted(*arguments, name=name):
            # Sets of layers are parts of their own; every part gets a file that goes on.
            chosen = next((each for each in arguments if isinstance(each, tuple)), ())
            order.append(" ".join((name, *chosen)))
            assert isinstance(arguments[-1], ReportFile)

        monkeypatch.setattr(part, "run", noted)
    gpu = torch.device("cuda")
    everything.run(tmp_path, tmp_path, gpu, torch.float16, 2, 540)
    assert order == [
        *("convolutions", "host", "models", "layers rows", "layers models", "layers training"),
        *("layers sweep", "first_call"),
    ]
