"""The benchmark on a CPU: what it measures, what it refuses, and what becomes of its JSON."""

import json

import pytest
import torch
from comfyui_deltaconv.kernels import bench, plot
from comfyui_deltaconv.kernels.accuracy import distance
from comfyui_deltaconv.kernels.benchmark import contenders, measure, rows
from comfyui_deltaconv.kernels.benchmark.rows import Row

CPU = torch.device("cpu")
TINY = (Row("tiny", 16, 3, 8, 2, 8), Row("tiny", 16, 3, 12, 2, 8, "sigmoid"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of two tiny rows, through the command."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "SMALL", TINY)
        patch.setattr(bench, "copy_bandwidth", lambda device: 1e10)
        assert bench.main(["--device", "cpu", "--repeats", "3", "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_row_is_measured_with_its_spread(report):
    forward = [entry for entry in report["results"] if entry["kind"] == "small"]
    assert [entry["side"] for entry in forward] == [8, 12]
    for entry in forward:
        assert {"attn1", "linfus", "nchw", "nhwc", "ours"} <= entry["eager"].keys()
        assert not any("WRONG" in reason for reason in entry["left_out"].values())
        for timing in entry["eager"].values():
            assert 0 < timing["low"] <= timing["median"] <= timing["high"]
            assert timing["samples"] == 3
    training = [entry for entry in report["results"] if entry["kind"] == "training"]
    assert len(training) == 2 and all(entry["saved"]["ours"] > 0 for entry in training)
    assert report["environment"]["torch"] == torch.__version__


def test_table_and_plot_come_from_the_json(report, tmp_path):
    text = plot.table(report)
    assert "| tiny | 16 | 3 | 8 |" in text and "ours / floor" in text
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    plot.draw(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_gets_no_time(monkeypatch):
    right = contenders.CONTENDERS["ours"]

    def wrong(*arguments):
        contender = right(*arguments)
        return contender._replace(run=lambda x: contender.run(x) * 1.001)

    monkeypatch.setitem(contenders.CONTENDERS, "ours", wrong)
    result = bench.measure_forward(TINY[0], 1, torch.float32, CPU, ("nchw", "ours"), 1)
    assert list(result["eager"]) == ["nchw"]
    assert "WRONG RESULT, not timed" in result["left_out"]["ours"]


def test_attention_is_attention():
    contender = contenders.CONTENDERS["attn1"](TINY[0], torch.float32, CPU)
    x = bench.random_input(TINY[0], 2, torch.float64, CPU)
    state = contender.exact.state_dict()
    q, k, v = ((x @ state[f"to_{n}.weight"].T).unflatten(-1, (2, 8)) for n in "qkv")
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
    expected = mixed @ state["to_out.weight"].T + state["to_out.bias"]
    assert distance(contender.exact(x), expected).worst < 1e-12


def test_linfusion_is_its_formula():
    row = TINY[0]
    module = contenders.CONTENDERS["linfus"](row, torch.float32, CPU).exact
    x = bench.random_input(row, 1, torch.float64, CPU)
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
    counts = {name: sum(n for _, n in sites) for name, sites in rows.MODELS.items()}
    assert counts == {"SD1.5 at 512²": 16, "SDXL at 1024²": 70}


def test_floors_count_what_must_be_done():
    row = Row("", 320, 7, 64, 8, 320)
    # As in the table this benchmark is judged by: 3.6 µs at 3006 GB/s, batch 2, fp16.
    assert rows.floors(row, 2, 2, 3006e9, None)["memory"] == pytest.approx(3.6e-6, rel=0.02)
    assert rows.depthwise_flops(row, 2) == 2 * 160 * 49 * 64 * 64 * 2 * 1.25


def test_saved_memory_leaves_out_what_the_caller_owns():
    x = torch.randn(100, requires_grad=True)
    assert measure.saved_for_backward(lambda: x * x, [x]) == 0
    assert measure.saved_for_backward(lambda: (x + 1).exp(), [x]) == 400


def test_flops_place_the_papers_headline(capsys):
    assert bench.main(["--flops"]) == 0
    assert "16384²" in capsys.readouterr().out
