"""The self-test as a node: its report, its progress, its interrupt, and inside a real server."""

import pytest
import torch
from comfyui_deltaconv.kernels import accuracy, eager, selftest

DTYPES = ("float16", "bfloat16", "float32")
pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")


@pytest.fixture(autouse=True)
def few_kernels(monkeypatch):
    monkeypatch.setattr(selftest, "KERNEL_SIZES", (3, 5))


def run(**inputs):
    """The report of the node."""
    from comfyui_deltaconv.nodes.selftest import DeltaConvSelfTest

    (text,) = DeltaConvSelfTest.execute(**inputs).args
    return text


def grid(text):
    """dtype and direction → words of its row."""
    lines = text.split("\n\n")[1].split("\n")
    heading, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert heading == ["may be trusted", "k=3", "k=5"]
    return {first: rest for first, *rest in rows}


def test_everything_is_trusted_on_a_cpu():
    text = run(seconds=600.0)
    names = [f"{dtype} {way}" for way in ("forward", "backward") for dtype in DTYPES]
    assert grid(text) == {name: ["yes", "yes"] for name in names}
    assert text.startswith("ΔConv self-test on CPU, torch ")
    assert "What ran: torch." in text and text.endswith("No wrong results.")


def test_what_is_wrong_is_named_with_the_way_out(monkeypatch):
    def broken(u, weights, scales, gate, biases):
        factor = 1.01 if u.dtype == torch.float32 and len(weights[0]) == 5 else 1
        return eager.gated_pyramid(u, weights, scales, gate, biases) * factor

    monkeypatch.setattr(accuracy, "gated_pyramid", broken)
    text = run(seconds=600.0)
    assert grid(text)["float32 forward"] == ["yes", "NO"]
    assert grid(text)["float16 forward"] == ["yes", "yes"]
    assert "float32   k=5   forward   torch   DO NOT TRUST: pyramid is off by" in text
    assert "update torch or the driver" in text
    monkeypatch.setattr(selftest, "implementation_of", lambda *_: "triton")
    assert "DELTACONV_KERNELS=torch, and test again" in run(seconds=600.0)


def test_a_crash_is_an_answer_too(monkeypatch):
    def crashes(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(accuracy, "gated_pyramid", crashes)
    text = run(seconds=600.0)
    assert grid(text)["bfloat16 forward"] == ["NO", "NO"]
    assert "RuntimeError: no such instruction" in text


def test_what_there_was_no_time_for_is_said():
    text = run(seconds=-1.0)
    assert grid(text)["float16 forward"] == ["?", "?"]
    assert "What ran: nothing" in text and "12 were not tested, give it more seconds" in text


def test_progress_and_interrupt(comfy, monkeypatch):
    import comfy.model_management
    import comfy.utils

    steps = []

    def hook(value, total, *_, **__):
        steps.append((value, total))
        if value == 1:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(seconds=600.0)
    assert steps == [(1, 12)]


def test_it_runs_as_the_end_of_a_workflow(server):
    prompt = {"test": {"class_type": "DeltaConvSelfTest", "inputs": {"seconds": 1.0}}}
    history = server.queue(prompt)
    (text,) = history["outputs"]["test"]["text"]
    assert "may be trusted" in text and "No wrong results" in text
