"""Steps that are planned from the pace: how many, kept by a resume, more where they are done."""

from contextlib import closing
from dataclasses import replace
from itertools import islice
from math import inf

import pytest
import torch
from comfyui_deltaconv.deltaconv.distillation import distill
from comfyui_deltaconv.deltaconv.distillation.plan import (
    FEWEST_JOINT,
    Pace,
    steps_within,
    with_steps,
)
from hypothesis import given
from hypothesis import strategies as st
from toy_teacher import PLAN, ToyTeacher, toy_data, toy_settings

FREE = with_steps(toy_settings(), 0, 0)


def run(folder=None, plan=None, settings=FREE, teacher=None):
    return distill(teacher or ToyTeacher(), PLAN, toy_data(), settings, plan=plan, folder=folder)


def steps(layers, joint):
    """A plan of these steps, which collects what it is asked."""

    def plan(pace, settings):
        plan.asked.append((pace, settings))
        before = settings.layers.steps + settings.joint.steps
        return with_steps(settings, layers, settings.joint.steps + joint if before else joint)

    plan.asked = []
    return plan


@given(
    seconds=st.floats(-10, 1e5),
    layers=st.floats(0, 100) | st.just(inf),
    joint=st.floats(0, 100) | st.just(inf),
)
def test_a_plan_fits_into_its_time(seconds, layers, joint):
    planned = steps_within(FREE, Pace(layers, joint), seconds)
    counts = (planned.layers.steps, planned.joint.steps)
    taken = sum(n * each for n, each in zip(counts, (layers, joint), strict=True) if n)
    assert taken <= max(0, seconds) + 1e-6
    for stage in (planned.layers, planned.joint):
        assert stage.warmup <= stage.steps // 10
    if 0.1 < layers < inf and 2 * layers < seconds:
        # Half of the time at least.
        assert counts[0] >= int(seconds / 2 / layers)
        assert counts[1] == 0 or counts[1] >= FEWEST_JOINT


def test_each_stage_gets_half_of_the_time():
    planned = steps_within(FREE, Pace(1.0, 2.0), 1000)
    assert (planned.layers.steps, planned.joint.steps) == (500, 250)


def test_too_few_joint_steps_are_none():
    assert steps_within(FREE, Pace(1.0, 2.0), 390).joint.steps == 0
    assert steps_within(FREE, Pace(1.0, 2.0), 390).layers.steps == 390


def test_a_stage_that_cannot_run_leaves_its_half():
    assert steps_within(FREE, Pace(1.0, inf), 1000).layers.steps == 1000
    assert steps_within(FREE, Pace(inf, 1.0), 1000).joint.steps == 1000


def test_what_is_done_gets_more_of_its_last_stage():
    more = steps_within(with_steps(FREE, 3, 4), Pace(1.0, 2.0), 10)
    assert (more.layers.steps, more.joint.steps) == (3, 9)
    more = steps_within(with_steps(FREE, 3, 0), Pace(1.0, 2.0), 10)
    assert (more.layers.steps, more.joint.steps) == (13, 0)
    # Once there is time for it, the joint stage follows.
    more = steps_within(with_steps(FREE, 3, 0), Pace(1.0, 2.0), 1000)
    assert (more.layers.steps, more.joint.steps) == (3, 500)


def test_the_plan_hears_the_pace_and_its_steps_are_trained():
    plan = steps(3, 2)
    records = list(run(plan=plan))
    assert [r.stage for r in records] == ["init", "plan", *["layers"] * 3, *["joint"] * 2]
    ((pace, settings),) = plan.asked
    assert 0 < pace.layers < 60 and 0 < pace.joint < 60
    assert settings == FREE
    assert "3 layer and 2 joint steps" in records[1].message
    assert records[-1].settings == with_steps(FREE, 3, 2)
    assert [r.steps for r in records[2:]] == [3, 3, 3, 2, 2]


def test_measuring_the_pace_changes_nothing():
    """The same weights as steps that were given, to the bit."""
    planned = list(run(plan=steps(3, 2)))[-1].student.averaged_blocks()
    given_steps = list(run(settings=with_steps(FREE, 3, 2)))[-1].student.averaged_blocks()
    for site, block in planned.items():
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, given_steps[site].state_dict()[name]), (site, name)


def test_a_resumed_run_keeps_its_plan(tmp_path):
    with closing(run(tmp_path, steps(3, 4))) as records:
        list(islice(records, 4))
    again = steps(9, 9)
    records = list(run(tmp_path, again))
    assert not again.asked
    assert [r.stage for r in records] == [*["layers"] * 1, *["joint"] * 4]
    assert "resumed after 2 steps" in records[0].message
    assert "other settings" not in records[0].message


def test_another_pace_at_the_initialization_is_no_other_setting(tmp_path):
    """The number of its images follows the pace too, which is another on the next day."""
    with closing(run(tmp_path, steps(3, 4))) as records:
        list(islice(records, 4))
    settings = replace(FREE, init_images=FREE.init_images + 8)
    records = list(run(tmp_path, steps(9, 9), settings=settings))
    assert "other settings" not in records[0].message
    assert records[-1].settings == with_steps(FREE, 3, 4)


def test_a_run_that_is_done_asks_for_more(tmp_path):
    list(run(tmp_path, steps(2, 2)))
    more = steps(2, 3)
    records = list(run(tmp_path, more))
    assert [r.stage for r in records] == ["plan", *["joint"] * 3]
    assert more.asked[0][1] == with_steps(FREE, 2, 2)
    assert [r.step for r in records[1:]] == [3, 4, 5]
    assert len(records[-1].history) == 7


def test_no_time_left_is_the_initialization_alone(tmp_path):
    records = list(run(tmp_path, steps(0, 0)))
    assert [r.stage for r in records] == ["init", "plan"]
    # Resumed with time, it is trained.
    records = list(run(tmp_path, steps(1, 1)))
    assert [r.stage for r in records] == ["plan", "layers", "joint"]


def test_without_gradients_the_joint_stage_is_not_timed():
    teacher = ToyTeacher()
    teacher.why_not_differentiable = "its weights are frozen."
    plan = steps(1, 0)
    list(run(plan=plan, teacher=teacher))
    assert plan.asked[0][0].joint == inf


@pytest.mark.parametrize("layers", [0, 2])
def test_an_interrupt_while_timing_loses_nothing(tmp_path, layers):
    class Stopping(ToyTeacher):
        left = inf

        def predict(self, *arguments, **options):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().predict(*arguments, **options)

    teacher = Stopping()
    with pytest.raises(KeyboardInterrupt):
        for record in run(tmp_path, steps(layers, 1), teacher=teacher):
            if record.stage == "init":
                teacher.left = 1
    records = list(run(tmp_path, steps(layers, 1)))
    assert [r.stage for r in records] == ["plan", *["layers"] * layers, "joint"]


def test_settings_of_a_plan_are_what_the_state_says(tmp_path):
    with closing(run(tmp_path, steps(3, 4))) as records:
        list(islice(records, 3))
    settings = replace(FREE, save_every=7)
    records = list(run(tmp_path, steps(9, 9), settings=settings))
    assert records[-1].settings == with_steps(settings, 3, 4)
