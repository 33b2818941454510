"""The guided prediction: as a measure along the teacher's sampling, and as a loss."""

from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from comfyui_deltaconv.deltaconv.distillation import (
    DistillationError,
    distill,
    in_place_of_attention,
    sample,
)
from comfyui_deltaconv.deltaconv.distillation.checkpoint import state_files
from comfyui_deltaconv.deltaconv.distillation.data import draw
from comfyui_deltaconv.deltaconv.distillation.losses import joint_losses
from comfyui_deltaconv.deltaconv.distillation.measure import guided_path
from comfyui_deltaconv.deltaconv.distillation.own_samples import own_samples
from comfyui_deltaconv.deltaconv.distillation.settings import new_blocks, read_plan
from comfyui_deltaconv.deltaconv.distillation.student import Student
from comfyui_deltaconv.deltaconv.distillation.teacher import noise_levels
from toy_teacher import PLAN, SIZE, ToyTeacher, toy_data, toy_settings

SHAPE = (3, SIZE, SIZE)


class Counting(ToyTeacher):
    """Counts the images of calls without blocks, the teacher's own."""

    images = 0

    def predict(self, x, sigma, conditions, visit=None, features=None):
        if visit is None:
            self.images += len(x)
        return super().predict(x, sigma, conditions, visit, features)


def blocks(seed=0):
    torch.manual_seed(seed)
    return new_blocks(read_plan(PLAN, ToyTeacher().dims), ToyTeacher().dims, "scaled")


def path(cfg=4.0, steps=5):
    data, teacher = toy_data(), ToyTeacher()
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    return guided_path(
        teacher, data.conditions[:2], data.unconditional, noise, steps=steps, cfg=cfg
    )


def samples(count=6, **options):
    data = toy_data()
    names = [str(index) for index in range(len(data.conditions))]
    return own_samples(
        ToyTeacher(), data.conditions, names, data.unconditional, SHAPE, count=count, **options
    )


def test_the_teacher_is_without_error_along_its_own_sampling():
    assert path().errors(ToyTeacher(), in_place_of_attention({})) == [0.0] * 5


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_steps_error_is_that_of_the_state_after_it(cfg):
    teacher, visit, found = ToyTeacher(), in_place_of_attention(blocks()), path(cfg)
    levels = noise_levels(teacher, 5)
    expected = []
    for point, (before, after) in zip(found.points, pairwise(levels), strict=True):
        calls = [found.conditions, [found.unconditional] * 2]
        halves = [teacher.predict(point.x, point.sigma, each, visit) for each in calls]
        guided = halves[1] + cfg * (halves[0] - halves[1])
        state = point.x + (after - before) * guided
        right = point.x + (after - before) * point.predicted.guided(cfg)
        expected.append(((state - right).square().mean() / point.x.square().mean()).item())
    assert found.errors(teacher, visit) == pytest.approx(expected, rel=1e-3)


def test_the_path_ends_where_sampling_does():
    found, data = path(), toy_data()
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    end = sample(ToyTeacher(), data.conditions[:2], data.unconditional, noise, steps=5)
    assert torch.equal(found.latents, end)
    assert found.positions == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])


def guided_loss(batch, settings, teacher):
    student = Student(blocks(), settings, teacher.device)
    gradients = []
    losses = joint_losses(
        teacher, student, batch, 1.0, lambda loss: gradients.append(loss.backward()), settings
    )
    assert len(gradients) == 1
    grads = {name: p.grad.clone() for name, p in student.parameters.items()}
    return losses, grads


def first_batch(data, **options):
    defaults = {"seed": 0, "batch": 4, "position": 0, "unconditional": 0.0}
    generator = torch.Generator().manual_seed(0)
    return draw(data, ToyTeacher(), generator, **{**defaults, **options})


def test_the_guided_loss_is_its_formula():
    settings = toy_settings(losses={"guided": 2.0, "teacher": 0.5}, guidance=3.0, min_snr=0.5)
    teacher, batch = ToyTeacher(), first_batch(toy_data())
    losses, _ = guided_loss(batch, settings, teacher)
    visit = in_place_of_attention(blocks())
    empty = [batch.unconditional] * 4
    apart = [
        teacher.predict(batch.x, batch.sigma, each, visit)
        - teacher.predict(batch.x, batch.sigma, each)
        for each in (batch.conditions, empty)
    ]
    weights = (0.5 * batch.sigma.square()).clamp_max(1)[:, None, None, None]
    guided = ((3 * apart[0] - 2 * apart[1]).square() * weights).mean()
    plain = sum((part.square() * weights).mean() for part in apart) / 2
    assert losses["guided"].item() == pytest.approx(2.0 * guided.item(), rel=1e-4)
    assert losses["teacher"].item() == pytest.approx(0.5 * plain.item(), rel=1e-4)


@pytest.mark.parametrize("losses", [{"guided": 1.0}, {"teacher": 1.0}, {"guided": 1, "noise": 1}])
def test_kept_predictions_give_the_losses_of_the_teachers_passes(losses):
    settings = toy_settings(losses=losses)
    options = {"trajectory_share": 1.0, "unconditional": 0.5}
    known, unknown = (
        first_batch(samples(predicted=predicted), **options) for predicted in (True, False)
    )
    assert known.predicted is not None and unknown.predicted is None
    assert torch.equal(known.x, unknown.x)
    teachers = Counting(), Counting()
    (kept, kept_grads), (passed, passed_grads) = (
        guided_loss(batch, settings, teacher)
        for batch, teacher in zip((known, unknown), teachers, strict=True)
    )
    # Predictions are kept in float16.
    for name, loss in passed.items():
        assert kept[name].item() == pytest.approx(loss.item(), rel=2e-2)
    for name, grad in passed_grads.items():
        assert torch.allclose(
            kept_grads[name], grad, rtol=5e-2, atol=2e-2 * float(grad.abs().max())
        )
    assert teachers[0].images == 0
    assert teachers[1].images == (8 if "guided" in losses else 4)


def test_parts_keep_what_is_known():
    batch = first_batch(samples(predicted=True), trajectory_share=1.0)
    parts = list(batch.parts(2))
    for half in range(2):
        joined = torch.cat([part.predicted[half] for part in parts])
        assert torch.equal(joined, batch.predicted[half])


@pytest.mark.parametrize("trajectory_share", [0.0, 1.0])
def test_nothing_before_the_start_is_drawn(trajectory_share):
    data, teacher = samples(12, predicted=True), ToyTeacher()
    generator = torch.Generator().manual_seed(0)
    highest = float(teacher.sigmas(torch.tensor(0.4)))
    found = []
    for position in range(30):
        options = {"seed": 0, "batch": 4, "position": position, "unconditional": 0.1}
        batch = draw(
            data, teacher, generator, **options, trajectory_share=trajectory_share, start=0.4
        )
        found.append(batch.sigma)
    sigmas = torch.cat(found)
    assert sigmas.max() <= highest + 1e-6
    # Everything after it is: the 120 draws come close to both ends.
    assert sigmas.max() > highest - 0.2 and sigmas.min() < 0.25


def test_kept_predictions_count_towards_the_limit_on_disk():
    plain, both = (samples(4, max_bytes=40_000, predicted=p) for p in (False, True))
    kept = [len(data.trajectories[0].sigma) for data in (plain, both)]
    assert kept[0] > kept[1] >= 1
    with pytest.raises(DistillationError, match="Expected room for 4 samples"):
        samples(4, max_bytes=4 * 4 * 2 * 3 * SIZE**2 - 1, predicted=True)


CHOSEN = {"first"}


def chosen_run(folder=None, stop=None, teacher=None):
    asked = []

    def choose(blocks):
        asked.append(set(blocks))
        return CHOSEN, 0.5

    settings = toy_settings(init="random")
    records = distill(
        teacher or ToyTeacher(), PLAN, toy_data(), settings, choose=choose, folder=folder
    )
    with closing(records):
        return list(islice(records, stop)), asked


def test_only_the_chosen_blocks_are_trained_and_handed_over():
    records, asked = chosen_run()
    assert asked == [set(PLAN)]
    assert [record.stage for record in records[:3]] == ["init", "choice", "layers"]
    assert records[2].losses.keys() == CHOSEN
    assert records[-1].student.averaged_blocks().keys() == CHOSEN


@pytest.mark.parametrize("stop", [2, 5, 10])
def test_a_choice_is_made_once_and_resumes_bit_for_bit(tmp_path, stop):
    straight, _ = chosen_run()
    chosen_run(tmp_path, stop)
    after, asked = chosen_run(tmp_path)
    assert not asked
    assert after[-1].student.averaged_blocks().keys() == CHOSEN
    losses = [r.loss for r in after if r.stage in ("layers", "joint")]
    assert losses == [r.loss for r in straight[-len(losses) :]]


def test_a_choice_that_was_interrupted_is_asked_for_again(tmp_path):
    def interrupted(blocks):
        raise KeyboardInterrupt

    records = distill(
        ToyTeacher(),
        PLAN,
        toy_data(),
        toy_settings(init="random"),
        choose=interrupted,
        folder=tmp_path,
    )
    with pytest.raises(KeyboardInterrupt):
        list(records)
    assert state_files(tmp_path)
    records, asked = chosen_run(tmp_path)
    assert asked == [set(PLAN)] and records[0].stage == "choice"


def test_more_steps_of_a_choice_ask_nothing_again(tmp_path):
    chosen_run(tmp_path)
    settings = replace(toy_settings(init="random"), seed=1)
    records = distill(
        ToyTeacher(), PLAN, toy_data(), settings, choose=lambda b: 1 / 0, folder=tmp_path
    )
    (record,) = records
    assert "complete already" in record.message
    assert record.student.averaged_blocks().keys() == CHOSEN
