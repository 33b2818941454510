"""The benchmark on a CPU: what it measures, what it refuses, and what becomes of its JSON."""

import json

import pytest
import torch
from comfyui_deltaconv.kernels import bench, plot
from comfyui_deltaconv.kernels.accuracy import distance
from comfyui_deltaconv.kernels.benchmark import check, contenders, measure, rows, trial
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("side", [41, 64])
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
