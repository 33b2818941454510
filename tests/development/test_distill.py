"""`python dev.py distill --compare` and `--demo`: what they plan, and a demo in seconds."""

import json
import time
from dataclasses import replace

import pytest
import torch
from comfyui_deltaconv.deltaconv import read_weights
from comfyui_deltaconv.deltaconv.distillation import PRESETS
from comfyui_deltaconv.deltaconv.geometry import BlockPlan
from comfyui_deltaconv.development.distill_compare import (
    AUTHORS,
    _authors,
    _begun,
    _ours,
    _steps_within,
)
from comfyui_deltaconv.development.distill_demo import Pace, distill_demo
from PIL import Image


@pytest.mark.parametrize("preset", AUTHORS)
def test_a_comparison_trains_with_the_preset_that_it_names(preset):
    settings, own = _authors(preset, (0, 20), 2.0, 5), PRESETS[preset]()
    assert settings.losses == own.losses and settings.init == "random" and settings.seed == 5
    assert (settings.layers.steps, settings.joint.steps, settings.joint.lr) == (0, 20, 2e-3)
    assert settings.joint.weight_decay == own.joint.weight_decay
    assert settings.joint.decayed == own.joint.decayed
    name = AUTHORS[preset]
    assert _steps_within(60, name, {f"{name} joint": 2.0}) == (0, 30)


def test_ours_takes_the_steps_that_a_users_minutes_give():
    pace = {"ours init": 100.0, "ours layers": 0.5, "ours joint": 5.0}
    # Too few joint steps are none.
    assert _steps_within(600, "ours", pace) == (1000, 0)
    assert _steps_within(1200, "ours", pace) == (1100, 110)
    assert _steps_within(50, "ours", pace) == (0, 0)


@pytest.mark.parametrize("seconds", [0.005, 0.5, 5.0, 60.0])
def test_the_demo_plans_its_work_by_the_machines_pace(seconds):
    """A fifth for pictures, an eighth for the initialization."""
    pace = Pace(teacher=seconds, student=seconds / 2)
    pictures = 2 * pace.picture_steps(310) * (seconds + 3 * seconds / 2)
    init = 2 * pace.init_images(310) * seconds / 4
    if seconds < 1:
        assert pictures + init < 0.5 * 310
    if seconds < 0.1:
        assert pace.picture_steps(310) == 20
    # However slow, each part is there.
    assert pace.picture_steps(310) >= 6 and pace.init_images(310) >= 32


@pytest.mark.any_comfyui
@pytest.mark.usefixtures("comfy")
def test_the_distilled_demo_ends_in_time_with_its_grid_and_curve(tmp_path, capsys):
    started = time.process_time()
    figures = distill_demo(tmp_path, seconds=20, side=16)["psnr"]
    # The processor's time: on a machine that does other things, what cannot be left out takes
    # longer by the clock.
    assert time.process_time() - started < 60 * torch.get_num_threads()
    assert figures["untrained"] < min(figures["initialised"], figures["distilled"])
    grid = Image.open(tmp_path / "distil_demo.png")
    assert grid.width > 4 * 192 and grid.height > 4 * 192
    assert Image.open(tmp_path / "distil_demo_loss.png").width > 400
    said = capsys.readouterr().out
    weights = read_weights(tmp_path / "distil_demo.safetensors")
    # At this size that depends on what else the machine does.
    none = len(weights.sites) == 10 and "no block is faster than attention" in said
    assert none or f"blocks in {len(weights.sites)} of 10 layers" in said
    for words in ("joint steps in all", "PSNR", "held-out noise"):
        assert words in said


def test_each_row_of_the_comparison_has_its_own_recipe():
    assert _ours((3, 4), 2.0, 5).growth == 1
    tokens = _ours((3, 4), 2.0, 5, preset="tokens")
    assert tokens == replace(_ours((3, 4), 2.0, 5), growth=10.0)
    assert (tokens.layers.steps, tokens.joint.steps, tokens.seed) == (3, 4, 5)


def test_a_stopped_comparison_goes_on_with_recipes_of_the_same_settings(tmp_path):
    file, identity = tmp_path / "compare.json", {"minutes": 10.0}
    recipes = {"theirs": PRESETS["paper"](), "ours": PRESETS["default"]()}
    plain = {name: each.to_mapping() for name, each in recipes.items()}
    blocks = {"theirs": {"site": 9}, "ours": {"site": BlockPlan(5, heads=2)}}
    kept = {"site": {"kernel": 5, "scales": [1.0, 0.5], "biased": [], "heads": 2}}
    fresh = {**identity, "settings": plain, "blocks": {**blocks, "ours": kept}, "seconds": {}}

    def begun(identity=identity, recipes=recipes, blocks=blocks):
        return _begun(file, identity, recipes, blocks)

    assert begun() == fresh
    # As before there was a setting: its default counts.
    older = {**plain["theirs"]}
    del older["kept_gib"]
    runs = {"theirs": {"runs": [1]}, "ours": {"runs": [2]}}
    seconds = {"theirs joint": 5.0, "ours joint": 6.0}
    found = {**fresh, "settings": {**plain, "theirs": older}, "seconds": seconds, **runs}
    file.write_text(json.dumps(found), encoding="utf-8")
    assert begun() == {**fresh, "seconds": seconds, **runs}
    changed = {**recipes, "ours": PRESETS["default"](init_images=3)}
    others = {**blocks, "ours": {"site": BlockPlan(5, heads=4)}}
    for of_these in (begun(recipes=changed), begun(blocks=others)):
        assert of_these["theirs"] == runs["theirs"] and "ours" not in of_these
        assert of_these["seconds"] == {"theirs joint": 5.0}
    assert "theirs" not in begun({"minutes": 5.0})
    for broken in ("", "[]", "{", "3"):
        file.write_text(broken, encoding="utf-8")
        assert begun() == fresh
