"""`dev.py eval` against the golden outputs, and what it says to files it cannot use."""

import re
import subprocess
import sys

import pytest
import torch
from comfyui_deltaconv.deltaconv import demo
from comfyui_deltaconv.development import ROOT, DevelopmentError
from comfyui_deltaconv.development.eval import read_input
from safetensors.torch import load_file, save_file


def run_eval(folder, comfyui_tree, monkeypatch, weights, source):
    """What `dev.py eval` does in its own process, on the ComfyUI under test."""
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui_tree))
    line = [sys.executable, "-I", "-m", "comfyui_deltaconv.development", "eval"]
    line += ["--weights", str(weights), "--input", str(source), "--output", str(folder / "out.st")]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.any_comfyui
@pytest.mark.parametrize(
    ("weights", "expected"), [("none", "teacher_eps"), (demo.DELTACONV_PATH, "student_eps")]
)
def test_meets_golden(tmp_path, comfyui_tree, monkeypatch, data, weights, expected):
    golden = load_file(data / "demo_forward.safetensors")
    save_file({name: golden[name] for name in ("x", "timesteps", "context")}, tmp_path / "in.st")
    done = run_eval(tmp_path, comfyui_tree, monkeypatch, weights, tmp_path / "in.st")
    assert done.returncode == 0, done.stderr
    eps = load_file(tmp_path / "out.st")["eps"]
    assert eps.dtype == torch.float32
    assert (eps - golden[expected]).norm() / golden[expected].norm() < 1e-4
    assert not list(tmp_path.glob("*.partial"))


def tensors(**changes):
    whole = {"x": torch.zeros(2, 3, 8, 8), "timesteps": torch.ones(2)}
    return whole | {"context": torch.zeros(2, 12, 64)} | changes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a safetensors file", "Expected a safetensors file with x, timesteps, context"),
        (None, "Expected a safetensors file with x, timesteps, context"),
        ({"x": torch.zeros(2, 3, 8, 8)}, "expected timesteps [B] with B = 2, got no such tensor"),
        (tensors(x=torch.zeros(2, 4, 8, 8)), "expected x [B, 3, H, W], got [2, 4, 8, 8]"),
        (tensors(timesteps=torch.ones(3)), "expected timesteps [B] with B = 2, got [3]"),
        (tensors(context=torch.full((2, 12, 64), torch.nan)), "NaN or infinity in context"),
    ],
)
def test_refuses_bad_input_in_a_sentence(tmp_path, content, reason):
    source = tmp_path / "in.st"
    if isinstance(content, dict):
        save_file(content, source)
    elif content is not None:
        source.write_bytes(content)
    with pytest.raises(DevelopmentError, match=re.escape(reason)):
        read_input(source)


@pytest.mark.any_comfyui
def test_refuses_bad_weights_in_a_sentence(tmp_path, comfyui_tree, monkeypatch):
    save_file(tensors(), tmp_path / "in.st")
    save_file({"nothing.of.ours": torch.zeros(1)}, tmp_path / "weights.safetensors")
    weights = tmp_path / "weights.safetensors"
    done = run_eval(tmp_path, comfyui_tree, monkeypatch, weights, tmp_path / "in.st")
    assert done.returncode == 1
    assert "weights.safetensors" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.st").exists()
