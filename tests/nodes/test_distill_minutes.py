"""Distill ΔConv within a time: what it plans, keeps to, and goes on with."""

import re
import time
from types import SimpleNamespace

import pytest
import torch
from comfyui_deltaconv.deltaconv.distillation import default_settings
from distill_nodes import distill

pytestmark = pytest.mark.usefixtures("distilling")

SMALL = {
    "kernels": "by size",
    "prompts": "red apple\noctopus",
    "choice": "fastest",
    "folder": "run",
    "batch_size": 2,
    "sample_size": 16,
    "initialization": "random",
    "preview_every": 0,
    "samples": 8,
}


def planned(report):
    """(layer steps, joint steps) that a report tells of."""
    found = re.search(r"plan: .*?(\d+) layer and (\d+) joint steps", report)
    return tuple(map(int, found.groups())) if found else None


@pytest.fixture
def slow_clock(monkeypatch):
    """A budget's clock at a tenth: what comes before the steps may take long on a busy machine."""
    from comfyui_deltaconv.nodes.host import distill_time

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() / 10)
    monkeypatch.setattr(distill_time, "time", clock)


@pytest.mark.usefixtures("slow_clock")
def test_samples_and_steps_fit_into_the_minutes(model):
    weights, loss_map, report = distill(model, **SMALL, minutes=0.03)
    layers, joint = planned(report)
    assert layers >= 1 and len(loss_map["loss"]) <= layers + joint
    assert len(weights.sites) == 10
    assert weights.training["settings"]["layers"]["steps"] == layers
    drawn = int(re.search(r"own samples: (\d+) drawn", report)[1])
    assert 2 <= drawn <= 8


@pytest.mark.any_comfyui
@pytest.mark.usefixtures("slow_clock")
def test_a_done_run_is_trained_for_its_minutes_again(model):
    first = distill(model, **SMALL, minutes=0.03)
    again = distill(model, **SMALL, minutes=0.03, seed=1)
    before, after = planned(first[2]), planned(again[2])
    assert after and sum(after) > sum(before)
    assert len(again[1]["loss"]) > len(first[1]["loss"])


@pytest.mark.any_comfyui
@pytest.mark.usefixtures("slow_clock")
def test_a_run_that_became_slow_ends_in_time_and_goes_on_by_its_plan(model, monkeypatch):
    from comfyui_deltaconv.nodes.host import distill_time

    with monkeypatch.context() as slow:
        slow.setattr(distill_time.TimeBudget, "over", True)
        _, loss_map, report = distill(model, **SMALL, minutes=0.03)
    assert len(loss_map["loss"]) == 1
    assert "stopped at layers step 1 of " in report and "Queue again to go on" in report
    _, loss_map, again = distill(model, **SMALL, minutes=0.03)
    assert planned(again) is None and "resumed after 1 steps" in again
    assert len(loss_map["loss"]) == sum(planned(report)) or "stopped at" in again


@pytest.mark.any_comfyui
def test_no_minutes_take_the_steps_of_the_settings(model):
    _, loss_map, report = distill(model, **{**SMALL, "samples": 2}, layer_steps=3, joint_steps=0)
    assert len(loss_map["loss"]) == 3 and planned(report) is None


@pytest.fixture
def budget(monkeypatch):
    """A budget of 100 s by a clock that the test sets."""
    from comfyui_deltaconv.nodes.host import distill_time

    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(distill_time, "time", SimpleNamespace(monotonic=lambda: now.time))
    made = distill_time.TimeBudget(100.0)
    return SimpleNamespace(made=made, now=now)


def test_shares_of_the_time(budget):
    from comfyui_deltaconv.deltaconv.distillation.plan import Pace, with_steps

    made, now = budget.made, budget.now
    assert not made.enough_samples(2)
    now.time = 21.0
    assert made.enough_samples(2) and not made.enough_samples(0)
    now.time = 50.0
    free = with_steps(default_settings(), 0, 0)
    steps = made.plan(Pace(0.1, 0.2), free)
    assert (steps.layers.steps, steps.joint.steps) == (225, 112)
    assert not made.over
    now.time = 101.0
    assert made.over and made.plan(Pace(1.0, 3.0), free).layers.steps == 0


@pytest.mark.parametrize("seconds", [0.001, 0.05, 10.0])
def test_images_of_the_initialization_fit(budget, seconds):
    """Whole batches of 8, at most as many as the settings ask for, and never too few."""

    class Teacher:
        device = torch.device("cpu")

        def predict(self, x, sigma, conditions):
            budget.now.time += seconds * len(x)
            return x

    settings = budget.made.fitted(default_settings(), Teacher(), ["a"], (3, 8, 8))
    # Each is seen twice, in a fifth of 100 s.
    expected = {0.001: 128, 0.05: 128, 10.0: 16}[seconds]
    assert settings.init_images == expected and settings.init_images % 8 == 0


def test_without_minutes_nothing_ends():
    from comfyui_deltaconv.nodes.host.distill_time import TimeBudget

    budget = TimeBudget(0.0)
    assert not budget and not budget.over and not budget.enough_samples(10**6)
    settings = default_settings()
    assert budget.fitted(settings, None, [], ()) is settings
