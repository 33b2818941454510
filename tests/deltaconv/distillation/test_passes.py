"""Passes of the teacher that serve several updates."""

import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import toy_teacher as toy
from comfyui_deltaconv.deltaconv.distillation import Dataset, distill
from comfyui_deltaconv.deltaconv.distillation.data import draw
from comfyui_deltaconv.deltaconv.distillation.losses import batch_losses
from comfyui_deltaconv.deltaconv.distillation.passes import (
    KeptPasses,
    KeptTeacher,
    chosen,
    record,
    record_joint,
)
from comfyui_deltaconv.deltaconv.distillation.settings import new_blocks, read_plan
from comfyui_deltaconv.deltaconv.distillation.student import Student
from comfyui_deltaconv.deltaconv.distillation.teacher import Prediction
from hypothesis import given, settings
from hypothesis import strategies as st

# Of an image: a site's x and y in 16 bits, its noised latents and the noise in 32.
SITE, DRAWN = 2 * toy.SIZE**2 * toy.CHANNELS * 2, 2 * toy.SIZE**2 * 3 * 4
# Of one pass of four images.
PASS = 4 * (2 * SITE + DRAWN)
GIB = 2**30


class Counting(toy.ToyTeacher):
    """Counts its passes by what they are for, and can blow up the maps of one."""

    def __init__(self):
        super().__init__()
        self.passes, self.blown = 0, None

    def predict(self, x, sigma, conditions, visit=None, features=None):
        self.passes += 1
        if self.passes == self.blown:
            x = x * float("inf")
        return super().predict(x, sigma, conditions, visit, features)


def run(layers=12, teacher=None, joint=0, **changes):
    """Records of a run from random blocks, whose stages alone call the teacher."""
    changes = {"init": "random", "updates": 4, **changes}
    options = {"folder": changes.pop("folder", None), "plan": changes.pop("plan", None)}
    goal = toy.toy_settings(layers, joint, **changes)
    return distill(teacher or Counting(), toy.PLAN, toy.toy_data(), goal, **options)


def figures(records):
    return [(r.stage, r.step, r.loss, dict(r.losses), r.lr) for r in records if r.stage != "init"]


def test_a_pass_serves_its_updates():
    teacher = Counting()
    records = figures(run(12, teacher))
    assert len(records) == 12 and teacher.passes == 3
    every = Counting()
    figures(run(12, every, updates=1))
    assert every.passes == 12


def test_the_error_falls_further_for_the_same_passes():
    def last(updates, steps):
        teacher = Counting()
        losses = [r.loss for r in run(steps, teacher, updates=updates)]
        assert teacher.passes == 10
        return sum(losses[-4:])

    assert last(8, 80) < 0.8 * last(1, 10)


@pytest.mark.parametrize("kept", [1.5, 3.5, 100])
@pytest.mark.parametrize("stop", [1, 4, 7, 10, 14, 17, 20, 22])
def test_resumed_among_its_updates_it_goes_on_bit_for_bit(tmp_path, stop, kept):
    size = {"kept_gib": kept * PASS / GIB, "joint": 11}
    whole = figures(run(13, **size))
    with closing(run(13, folder=tmp_path, **size)) as records:
        first = figures(islice(records, stop + 1))
    assert len(first) == stop
    assert [*first, *figures(run(13, folder=tmp_path, **size))] == whole


def test_a_pass_serves_joint_updates_too():
    teacher = Counting()
    records = figures(run(0, teacher, joint=12))
    # Every update has a pass of the student.
    assert len(records) == 12 and teacher.passes == 12 + 3
    every = Counting()
    figures(run(0, every, joint=12, updates=1))
    assert every.passes == 12 + 12


def test_a_joint_pass_that_is_too_large_is_not_kept():
    teacher = Counting()
    records = list(run(0, teacher, joint=6, kept_gib=0.3 * PASS / GIB))
    assert teacher.passes == 1 + 6 + 6
    (said,) = [record.message for record in records if record.message]
    assert "kept_gib" in said
    assert figures(records) == figures(run(0, joint=6, updates=1))


JOINT = [
    {"teacher": 1.0},
    {"noise": 0.5, "teacher": 1.0, "features": 0.001},
    {"teacher": 1.0, "normalised_features": 0.3},
    {"guided": 1.0},
    {"guided": 1.0, "noise": 0.2, "features": 0.01, "normalised_features": 0.3},
]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("losses", JOINT, ids=[" ".join(each) for each in JOINT])
def test_kept_joint_passes_have_the_losses_of_fresh_ones(losses, parts):
    teacher, goal = Counting(), toy.toy_settings(losses=losses)
    torch.manual_seed(0)
    student = Student(
        new_blocks(read_plan(toy.PLAN, teacher.dims), teacher.dims, "scaled"), goal, teacher.device
    )
    generator = torch.Generator().manual_seed(0)
    arguments = {"seed": 0, "batch": 5, "position": 0, "unconditional": 0.4}
    batch = draw(toy.toy_data(), teacher, generator, **arguments)

    def computed(batch):
        for parameter in student.parameters.values():
            parameter.grad = None
        found = batch_losses(teacher, student, batch, parts, torch.Tensor.backward, goal, True)
        return found, {name: p.grad.clone() for name, p in student.parameters.items()}

    fresh, gradients = computed(batch)
    kept = record_joint(teacher, batch, 5, 2, toy.PLAN, 10**6, goal)
    before = teacher.passes
    again, same = computed(kept.batch)
    assert teacher.passes == before + parts and kept.finite
    # Predictions are kept as they were, hidden states to float16's resolution.
    assert again == pytest.approx(fresh, rel=1e-3)
    for name, gradient in gradients.items():
        assert (same[name] - gradient).norm() <= 2e-3 * gradient.norm(), name
    if not losses.keys() & {"features", "normalised_features"}:
        assert not kept.batch.hidden


def test_what_own_samples_predicted_needs_no_pass():
    teacher, data = Counting(), toy.toy_data()
    goal = toy.toy_settings(losses={"teacher": 1.0})
    batch = draw(data, teacher, torch.Generator(), seed=0, batch=4, position=0, unconditional=0.1)
    known = replace(batch, predicted=Prediction(batch.noise, batch.noise))
    kept = record_joint(teacher, known, 4, 1, toy.PLAN, 10**6, goal)
    assert teacher.passes == 0 and kept.batch is known


def test_a_pass_that_is_too_large_is_not_kept_and_every_update_has_its_own():
    teacher = Counting()
    records = list(run(6, teacher, kept_gib=0.9 * PASS / GIB))
    # One more, that was too large.
    assert teacher.passes == 7
    (said,) = [record.message for record in records if record.message]
    assert "kept_gib" in said and "every update has its own" in said
    assert figures(records) == figures(run(6, updates=1))


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6, 9, 11, 13, 14, 17, 19])
def test_resumed_behind_a_pass_that_did_not_fit_it_goes_on_bit_for_bit(tmp_path, stop):
    small, large = toy.toy_data(), toy.toy_data(12)
    latents = [*small.latents, *(latent.repeat(1, 2, 2) for latent in large.latents)]
    both = Dataset(latents, [*small.conditions, *large.conditions], small.unconditional)
    goal = toy.toy_settings(12, 8, 2, init="random", kept_gib=2.5 * PASS / GIB, seed=1)

    def steps(**options):
        return distill(Counting(), toy.PLAN, both, goal, **options)

    whole = list(steps())
    said = [number for number, record in enumerate(whole) if "kept_gib" in record.message]
    # In each stage once, and not with its first step.
    assert len(said) == 2 and 1 < said[0] < 13 < said[1]
    with closing(steps(folder=tmp_path)) as records:
        first = figures(islice(records, stop + 1))
    assert [*first, *figures(steps(folder=tmp_path))] == figures(whole)


def test_what_is_kept_is_what_the_teacher_showed():
    teacher, site = toy.ToyTeacher(), "second"
    generator = torch.Generator().manual_seed(0)
    batch = draw(toy.toy_data(), teacher, generator, seed=0, batch=5, position=0, unconditional=0.1)
    shown, again = [], []

    def look(seen):
        def visit(site, x, attend):
            seen.append((site, x.float(), attend().float()))
            return seen[-1][2]

        return visit

    teacher.predict(batch.x, batch.sigma, batch.conditions, look(shown))
    kept = record(teacher, batch, 5, 2, [site], 10**6)
    replayed = KeptTeacher(kept, teacher.device)
    for part in batch.parts(3):
        replayed.predict(part.x, part.sigma, part.conditions, look(again))
    expected = next((x, y) for name, x, y in shown if name == site)
    assert {name for name, _, _ in again} == {site} and kept.bytes == 5 * (SITE + DRAWN)
    for at, whole in enumerate(expected, 1):
        # To float16's resolution.
        got = torch.cat([seen[at] for seen in again])
        assert (got - whole).abs().max() <= 2**-10 * whole.abs().max()


def test_every_process_counts_the_whole_batch():
    teacher, whole = toy.ToyTeacher(), []
    for rows in ([0], [1, 2], range(8)):
        generator = torch.Generator().manual_seed(0)
        arguments = {"seed": 0, "batch": 8, "position": 0, "unconditional": 0.1, "rows": rows}
        batch = draw(toy.toy_data(), teacher, generator, **arguments)
        whole.append(record(teacher, batch, 8, 1, toy.PLAN, 2 * PASS).bytes)
        assert record(teacher, batch, 8, 1, toy.PLAN, 2 * PASS - 1) is None
    assert whole == [2 * PASS] * 3


def test_a_map_beyond_half_precision_is_kept_in_its_range():
    class Large(toy.ToyTeacher):
        def _attention(self, layers, n):
            return 1e6 * super()._attention(layers, n)

    losses = figures(run(4, Large()))
    assert all(torch.tensor(loss).isfinite() for _, _, loss, _, _ in losses)


def test_a_pass_that_is_not_finite_is_met_once():
    teacher = Counting()
    teacher.blown = 2
    said = [record.message for record in run(16, teacher)]
    assert [at for at, message in enumerate(said) if "not finite" in message] == [5]


def test_memory_that_runs_out_while_a_pass_is_kept_takes_smaller_parts():
    teacher = Counting()
    teacher.most_images = 2
    records = list(run(5, teacher))
    assert [r.message for r in records if r.message] == [
        "out of memory: 2 images at a time from here on"
    ]
    whole = [r.loss for r in run(5)]
    assert [r.loss for r in records] == pytest.approx(whole, rel=1e-4)


def test_the_pace_counts_the_share_of_a_pass():
    class Slow(Counting):
        def predict(self, *arguments):
            time.sleep(0.2)
            return super().predict(*arguments)

    found = []

    def plan(pace, current):
        found.append(pace.layers)
        return current

    list(run(0, Slow(), plan=plan, updates=10))
    list(run(0, Slow(), plan=plan, updates=1))
    assert 0.02 < found[0] < 0.15 and found[1] > 0.2


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(50, 200), st.data())
def test_which_passes_are_kept_depends_on_the_newest_alone(sizes, most, data):
    def passes():
        ran = []

        def compute(number):
            ran.append(number)
            return SimpleNamespace(bytes=sizes[number], number=number)

        return KeptPasses(compute, most), ran

    forward, ran = passes()
    for newest in range(len(sizes)):
        here = [kept.number for kept in forward.up_to(newest)]
        assert here == list(range(newest, newest - len(here), -1))
        assert sum(sizes[number] for number in here) <= most
        # One more would not fit.
        if (before := here[-1] - 1) >= 0:
            assert sum(sizes[number] for number in (*here, before)) > most
        resumed, _ = passes()
        assert [kept.number for kept in resumed.up_to(newest)] == here
    if len(set(sizes)) == 1:
        # Equal ones run once each.
        assert ran == list(range(len(sizes)))


def test_the_newest_pass_comes_first_and_all_have_their_turn():
    passes = [SimpleNamespace(finite=True, number=number) for number in (7, 6, 5)]
    picked = [chosen(passes, step, 4, seed=0).number for step in range(200)]
    assert picked[::4] == [7] * 50 and set(picked) == {5, 6, 7}
    assert picked != [chosen(passes, step, 4, seed=1).number for step in range(200)]


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"updates": 0}, {"kept_gib": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            toy.toy_settings(**wrong)


def test_no_more_is_held_at_once_than_may_be():
    held = []

    def compute(number):
        held.append(sum(kept.bytes for kept in passes.kept.values()) + 10)
        return SimpleNamespace(bytes=10, number=number)

    passes = KeptPasses(compute, 35)
    for newest in range(8):
        passes.up_to(newest)
    assert held == [10, 20, 30, 30, 30, 30, 30, 30]
