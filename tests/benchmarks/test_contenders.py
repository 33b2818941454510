"""Contenders that only the benchmark has: the fused linear attention, and convolution by FFT."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # What is decorated while this is set is interpreted; no other test, and no server, inherits it.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed for this system")
from comfyui_deltaconv.benchmarks import linear_attention

os.environ.pop("TRITON_INTERPRET", None)
from comfyui_deltaconv.benchmarks import check, contenders
from comfyui_deltaconv.benchmarks.shapes import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A ragged map in one chunk of tokens, and two chunks of heads wider than a block of values.
ROWS = (Row("ragged", 40, 5, 9, 4, 8), Row("wide", 160, 7, 24, 2, 8, "sigmoid"))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["linear", "fft"])
@torch.no_grad()
def test_they_compute_what_they_stand_for(name, row, dtype, one_thread):
    x = check.random_input(row, 2, dtype, DEVICE)

    def error(name):
        contender = contenders.CONTENDERS[name](row, dtype, DEVICE)
        return check.forward_error(contender, x, contender.run(x))

    # The reference of both is in float64, of torch's own operators.
    assert check.forward_problem(name, error(name), error("nchw"), dtype) is None


def test_the_fused_form_runs_its_kernels_and_has_plain_weights(monkeypatch):
    ran = []
    attend = linear_attention.attend
    monkeypatch.setattr(
        linear_attention, "attend", lambda *tensors: ran.append(1) or attend(*tensors)
    )
    fused, plain = (contenders.CONTENDERS[n](ROWS[0], torch.float16, DEVICE) for n in PAIR)
    assert all(map(torch.equal, fused.tensors, plain.tensors))
    fused.run(check.random_input(ROWS[0], 1, torch.float16, DEVICE))
    assert ran == [1]


PAIR = ("linear", "linfus")


@pytest.mark.parametrize(("length", "smooth"), [(1, 2), (7, 8), (15, 16), (21, 24), (266, 270)])
def test_transforms_get_lengths_of_small_factors(length, smooth):
    assert contenders._smooth(length) == smooth
