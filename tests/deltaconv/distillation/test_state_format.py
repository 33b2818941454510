"""The state file as every version has written it: names, metadata and digest, spelled out."""

import hashlib
import json
from contextlib import closing
from itertools import islice

import pytest
import torch
import toy_teacher as toy
from comfyui_deltaconv.deltaconv.distillation import DistillationError, distill
from comfyui_deltaconv.deltaconv.distillation.checkpoint import state_files
from safetensors import safe_open
from safetensors.torch import save_file

STAGE = {
    "lr": 1e-3,
    "schedule": "cosine",
    "warmup": 2,
    "batch": 4,
    "accumulate": 1,
    "updates": 1,
    "clip": 1.0,
    "weight_decay": 0.0,
    "decayed": "all",
    "betas": [0.9, 0.99],
    "refit": False,
}
SETTINGS = {
    "init": "random",
    "init_images": 8,
    "kept_gib": 2.0,
    "layers": {"steps": 6, **STAGE, "lr": 3e-3},
    "joint": {"steps": 5, **STAGE},
    "losses": {"noise": 0.5, "teacher": 1.0, "features": 0.001},
    "guidance": 4.0,
    "min_snr": 0.0,
    "trajectory_share": 0.5,
    "unconditional": 0.1,
    "start": 0.0,
    "growth": 1.0,
    "ema": 0.99,
    "precision": "float32",
    "checkpointing": False,
    "eight_bit": False,
    "seed": 0,
    "save_every": 2,
    "lower_after": 3,
    "stop_after": 10,
}
PROGRESS = {
    "stage": "joint",
    "step": 2,
    "position": 8,
    "number": 8,
    "averaged": 2,
    "parts": 1,
    "bad": 0,
    "rate": 1.0,
    "scaler": {},
    "settings": SETTINGS,
    "replaced": None,
    "start": 0.0,
    "keeps": True,
}
# What states from before there was a choice of layers and steps lack.
SINCE = ("replaced", "start", "keeps")
SETTINGS_SINCE = ("guidance", "start", "kept_gib", "growth")
STAGE_SINCE = ("updates",)
IDENTITY = {
    "base": "toy-0",
    "recipe": {"gate": "scaled", "first": [5, [1.0, 0.5]], "second": [3, [1.0]]},
}


def run(folder, stop=None):
    settings = toy.toy_settings(init="random")
    records = distill(toy.ToyTeacher(), toy.PLAN, toy.toy_data(), settings, folder=folder)
    with closing(records):
        return list(islice(records, stop))


def read(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def write(path, tensors, progress):
    """A state file from these literals, with the digest that makes it readable."""
    metadata = {
        "deltaconv.state": "2",
        "deltaconv.identity": json.dumps(IDENTITY, sort_keys=True),
        "deltaconv.progress": json.dumps(progress),
    }
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    save_file(tensors, path, {**metadata, "deltaconv.digest": digest.hexdigest()})


@pytest.fixture
def stopped(tmp_path):
    """A folder with a run stopped after its eighth step, and its newest state."""
    run(tmp_path, 9)
    return state_files(tmp_path)[0]


def test_a_state_says_what_it_always_said(stopped):
    tensors, metadata = read(stopped)
    assert stopped.name == "state-00000008.safetensors"
    assert metadata.keys() == {
        f"deltaconv.{name}" for name in ("state", "identity", "progress", "digest")
    }
    assert metadata["deltaconv.progress"] == json.dumps(PROGRESS)
    assert json.loads(metadata["deltaconv.identity"]) == IDENTITY
    assert {name.partition(".")[0] for name in tensors} == {
        "weights",
        "ema",
        "optimiser",
        "rng",
        "history",
    }
    before = stopped.read_bytes()
    write(stopped, tensors, PROGRESS)
    assert read(stopped)[1] == metadata and len(stopped.read_bytes()) == len(before)


def older(progress):
    """The same, as it was written before there was a choice of layers and steps."""
    settings = {k: v for k, v in SETTINGS.items() if k not in SETTINGS_SINCE}
    for stage in ("layers", "joint"):
        settings[stage] = {k: v for k, v in SETTINGS[stage].items() if k not in STAGE_SINCE}
    return {k: v for k, v in progress.items() if k not in SINCE} | {"settings": settings}


@pytest.mark.parametrize("progress", [PROGRESS, older(PROGRESS)], ids=["now", "before"])
def test_a_state_written_by_hand_resumes_bit_for_bit(stopped, tmp_path, progress):
    straight = run(None)
    tensors, _ = read(stopped)
    for path in state_files(tmp_path):
        path.unlink()
    write(stopped, tensors, progress)
    after = run(tmp_path)
    assert after[0].message == "resumed after 8 steps"
    assert [r.loss for r in after] == [r.loss for r in straight[-len(after) :]]


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("stage", "init"),
        ("step", -1),
        ("position", True),
        ("number", 8.0),
        ("averaged", None),
        ("parts", "1"),
        ("bad", [0]),
        ("rate", 0.0),
        ("rate", float("nan")),
        ("scaler", None),
    ],
)
def test_progress_that_cannot_be_is_named_and_kept(stopped, tmp_path, entry, value):
    tensors, _ = read(stopped)
    for path in state_files(tmp_path):
        path.unlink()
    write(stopped, tensors, {**PROGRESS, entry: value})
    before = stopped.read_bytes()
    with pytest.raises(DistillationError, match=rf"{entry}: expected .*, got "):
        run(tmp_path)
    assert stopped.read_bytes() == before
