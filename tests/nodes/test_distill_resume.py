"""Going on with a distillation: what is drawn again, and what the node says where it stopped."""

from pathlib import Path

import pytest
import torch
from comfyui_deltaconv.deltaconv.distillation.checkpoint import saved_seed, saved_steps, state_files
from comfyui_deltaconv.deltaconv.geometry import BlockPlan
from comfyui_deltaconv.deltaconv.locality.recipe import Recipe
from distill_nodes import distill

pytestmark = pytest.mark.usefixtures("distilling")

DEFAULTS = {
    "kernels": "by size",
    "prompts": "red apple\ncat face",
    "layer_steps": 2,
    "joint_steps": 0,
    "batch_size": 2,
    "layer_rate": 1e-3,
    "joint_rate": 1e-3,
    "seed": 3,
    "folder": "run",
    "save_every": 1,
    "preview_every": 0,
    "losses": "ours",
    "initialization": "random",
    "precision": "float32",
    "gradient_checkpointing": True,
    "accumulate": 1,
    "samples": 2,
    "sample_size": 16,
}

# In place of own samples, where the test is of something else.
GIVEN = {"prompts": "octopus", "latents": {"samples": torch.zeros(1, 3, 16, 16)}}


@pytest.fixture
def lines(monkeypatch):
    """What the node shows, line by line."""
    from comfyui_deltaconv.nodes.host import node_text, preview

    shown = []
    for module in (node_text, preview):
        monkeypatch.setattr(module, "show_on_node", shown.append)
    return shown


def node(model, **changes):
    """The node's report."""
    return distill(model, **{**DEFAULTS, **changes})[2]


def folder(name="run"):
    from comfyui_deltaconv.nodes.host.distillation import state_folder

    return state_folder(name)


def samples():
    """Every file of own samples, with when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder().parent / "samples").iterdir()}


def test_another_seed_draws_no_sample_anew(model):
    assert "own samples: 2 drawn" in node(model)
    before = samples()
    report = node(model, seed=4, layer_steps=3)
    assert samples() == before
    assert "own samples: 2 of 2 reused" in report and "resumed after 2 steps" in report
    assert "own samples: 2 of 2 reused" in node(model, seed=5, folder="another")


def test_samples_that_an_earlier_version_drew_under_the_training_seed_are_used(model, monkeypatch):
    from comfyui_deltaconv.nodes.host import distillation

    with monkeypatch.context() as earlier:
        earlier.setattr(distillation, "_SAMPLES_SEED", DEFAULTS["seed"])
        node(model)
    before = samples()
    assert "own samples: 2 of 2 reused" in node(model, seed=4, layer_steps=3)
    assert samples() == before


def test_the_seed_is_read_from_the_newest_state_that_says_it(model):
    assert saved_seed(folder()) is saved_steps(folder()) is None
    node(model, **GIVEN)
    assert (saved_seed(folder()), saved_steps(folder())) == (3, 2)
    newest, _ = state_files(folder())
    newest.write_bytes(b"no state")
    assert saved_seed(folder()) == 3


def test_the_number_of_an_unnamed_folder_is_shown(model, lines):
    report = node(model, folder="", **GIVEN)
    assert lines[-1].startswith("layers 2/2, loss") and lines[-1].endswith(", folder 00001")
    assert str(Path("distillation", "00001")) in report
    node(model, folder="mine/first", **GIVEN)
    assert lines[-1].endswith(", folder " + str(Path("mine", "first")))


@pytest.fixture
def every_step(comfy, monkeypatch):
    """Progress that leaves no step out, however quick the machine is."""
    import comfy.utils

    for name in ("PROGRESS_THROTTLE_MIN_INTERVAL", "PROGRESS_THROTTLE_MIN_PERCENT"):
        monkeypatch.setattr(comfy.utils, name, 0)


def interrupt_at(comfy, model, value, total, **changes):
    """Run the node until its bar of `total` reaches `value`, then press the cross."""
    import comfy.model_management
    import comfy.utils

    def press(at, of, preview, node_id=None, **_):
        if (at, of) == (value, total):
            comfy.model_management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(press)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            node(model, **changes)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)


def test_after_an_interrupt_the_node_says_what_is_saved_and_how_to_go_on(
    comfy, every_step, model, lines
):
    interrupt_at(comfy, model, 3, 6, layer_steps=5, folder="", **GIVEN)
    assert lines[-1] == (
        "interrupted at layers 2/5, saved after 2 steps. To go on, queue again with folder 00001"
    )
    node(model, layer_steps=5, folder="00001", **GIVEN)
    assert lines[-1].startswith("layers 5/5")


def test_samples_drawn_before_an_interrupt_are_kept_and_the_node_says_so(
    comfy, every_step, model, lines
):
    # Twenty steps of sampling each; the second sample is begun.
    interrupt_at(comfy, model, 25, 40, batch_size=1)
    assert lines[-1] == (
        "interrupted at own samples 62%, before anything was saved; the own samples drawn so far "
        "are kept"
    )
    assert "own samples: 1 of 2 reused" in node(model, batch_size=1, seed=9)


def test_after_an_error_the_node_says_what_is_saved(model, lines, monkeypatch):
    from comfyui_deltaconv.nodes.host import preview

    def fails(*_, **__):
        raise RuntimeError("a sampler broke, as the test asked")

    monkeypatch.setattr(preview, "sample", fails)
    with pytest.raises(RuntimeError, match="as the test asked"):
        node(model, preview_every=2, **GIVEN)
    assert lines[-1].startswith("failed at layers 2/2, saved after 2 steps. To go on, queue again")


def test_a_refused_folder_leaves_no_line_of_another_run(model, lines):
    node(model, **GIVEN)
    with pytest.raises(ValueError, match="of this recipe"):
        node(model, kernels="published, else by size", recipe=one_layer())
    assert lines[-1].startswith("failed before it began, folder run. Expected ")
    assert saved_steps(folder()) == 2


def one_layer():
    return Recipe({"middle_block.1.transformer_blocks.0.attn1": BlockPlan(3, (1.0,))})
