"""Timed comparisons of distillation recipes on the demo teacher; hours on two cores."""

import json
import time

import pytest
import torch
from comfyui_deltaconv.development import ROOT

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("comfy")]


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_default_recipe_beats_the_published_losses_in_the_same_time():
    from comfyui_deltaconv.development.distil_compare import compare_recipes

    output = ROOT / "output" / "distil-compare.json"
    results = compare_recipes(10, 3, output)
    assert json.loads(output.read_text(encoding="utf-8")) == results
    assert results["ours"]["mse"] <= results["published losses"]["mse"] / 2
    assert results["ours"]["psnr"] > results["published losses"]["psnr"]


def test_informed_initialisation_alone_beats_200_layer_steps_from_random():
    from comfyui_deltaconv.deltaconv.distil import (
        DistilSettings,
        StageSettings,
        default_kernels,
        distil,
    )
    from comfyui_deltaconv.deltaconv.distil.evaluate import held_out_error
    from comfyui_deltaconv.development.distil import chosen_data, load_teacher

    teacher = load_teacher({}, DistilSettings())
    kernels = default_kernels(teacher.model_sites.levels)
    with teacher:
        data = chosen_data({}, teacher)

        def error(settings):
            records = list(distil(teacher, kernels, data, settings))
            return held_out_error(teacher, records[-1].student.averaged_blocks(), data)

        informed = error(DistilSettings())
        random = [
            error(DistilSettings(init="random", layers=StageSettings(200, lr=lr)))
            for lr in (1e-3, 3e-3, 1e-2)
        ]
    assert informed < min(random)


def test_demo_distils_within_six_minutes(tmp_path):
    from comfyui_deltaconv.development.distil_demo import distil_demo

    started = time.monotonic()
    figures = distil_demo(tmp_path)
    assert time.monotonic() - started < 360
    assert figures["untrained"] < figures["initialised"] < figures["distilled"]
    assert (tmp_path / "distil_demo.png").is_file()
