"""The distillation's core on a toy teacher: stages, guards, states, resuming."""

import json
import math
import random
import struct
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch
import toy_teacher as toy
from comfyui_deltaconv.deltaconv import read_weights, write_weights
from comfyui_deltaconv.deltaconv.distillation import (
    DistillationError,
    DistillationSettings,
    StageSettings,
    distill,
    weights_of,
)
from comfyui_deltaconv.deltaconv.distillation.checkpoint import state_files
from comfyui_deltaconv.deltaconv.distillation.data import Trajectory, draw
from safetensors.torch import load, save

PLAN, ToyTeacher, toy_data, toy_settings = toy.PLAN, toy.ToyTeacher, toy.toy_data, toy.toy_settings


def run(settings=None, teacher=None, **options):
    settings = settings or toy_settings()
    return list(distill(teacher or ToyTeacher(), PLAN, toy_data(), settings, **options))


def figures(records):
    """What must be the same bit for bit; a run resumed at its end only says that it is complete."""
    return [
        (r.stage, r.step, r.loss, dict(r.losses), r.lr)
        for r in records
        if "complete already" not in r.message
    ]


def test_loss_falls_in_both_stages():
    # An untrained teacher predicts no noise: the noise loss would pull the student from it.
    records = run(toy_settings(100, 80, init="random", losses={"teacher": 1.0}))
    layers = [r.loss for r in records if r.stage == "layers"]
    joint = [r.losses["teacher"] for r in records if r.stage == "joint"]
    assert sum(layers[-10:]) < 0.6 * sum(layers[:10])
    assert sum(joint[-20:]) < 0.8 * sum(joint[:20])


def test_informed_initialisation_beats_random_training():
    def first_loss(init, steps):
        records = run(toy_settings(steps + 20, 0, init=init, init_images=64))
        return sum(r.loss for r in records[-20:])

    assert first_loss("informed", 0) < first_loss("random", 60)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_batch_takes_each_share_of_the_steps_once(batch):
    generator, first_shares = torch.Generator().manual_seed(0), set()
    for position in range(20):
        arguments = {"seed": 0, "batch": batch, "position": position, "unconditional": 0.1}
        sigma = draw(toy_data(), ToyTeacher(), generator, **arguments).sigma
        # As the toy has it: sigma = 0.05 + 3 · (1 − step).
        shares = ((1 - (sigma - 0.05) / 3) * batch).floor().int().tolist()
        assert sorted(shares) == list(range(batch))
        first_shares.add(shares[0])
    assert len(first_shares) == batch


@pytest.mark.parametrize(("growth", "start"), [(1.0, 0.0), (5.0, 0.0), (50.0, 0.0), (50.0, 0.4)])
def test_early_steps_are_drawn_as_often_as_their_errors_grow(growth, start):
    """Each image in its own stratum of what is to be drawn: the share of draws before its step."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"seed": 0, "batch": 50, "unconditional": 0.1, "growth": growth, "start": start}
    for position in range(10):
        sigma = draw(toy_data(), ToyTeacher(), generator, position=position, **arguments).sigma
        step = 1 - (sigma.double() - 0.05) / 3
        assert step.min() > start - 1e-6
        within = (step - start) / (1 - start)
        # The integral of growth ** -step from start on, over all of it.
        rest = growth ** (1 - start)
        before = (1 - rest**-within) / (1 - 1 / rest) if growth > 1 else within
        expected = torch.arange(50) / 50
        assert ((before.sort().values - expected) > -1e-3).all()
        assert ((before.sort().values - expected) < 0.021).all()


def test_points_of_trajectories_are_drawn_as_often_as_their_errors_grow():
    data = toy_data()
    count = 20
    sigma = torch.linspace(3.04, 0.05, count)
    data.trajectories = [
        Trajectory(torch.zeros(count, *latent.shape), sigma) for latent in data.latents
    ]
    seen = []
    generator = torch.Generator().manual_seed(0)
    arguments = {"seed": 0, "batch": 24, "unconditional": 0.0, "trajectory_share": 1.0}
    for position in range(100):
        batch = draw(data, ToyTeacher(), generator, position=position, growth=10.0, **arguments)
        seen.append(batch.sigma)
    early, late = (torch.cat(seen) > sigma[9] - 1e-4).float().mean(), 10**0.5 / (1 + 10**0.5)
    # Three times the deviation of 2400 draws.
    assert abs(early - late) < 3 * (late * (1 - late) / 2400) ** 0.5


def test_same_seed_same_losses_and_another_seed_others():
    first, second = run(), run()
    assert figures(first) == figures(second)
    assert figures(run(toy_settings(seed=1))) != figures(first)


@pytest.mark.parametrize("stop", [1, 2, 5, 7, 9, 12])
def test_resume_is_bit_exact(tmp_path, stop):
    straight = run()
    with closing(
        distill(ToyTeacher(), PLAN, toy_data(), toy_settings(), folder=tmp_path)
    ) as records:
        before = list(islice(records, stop))
    after = run(folder=tmp_path)
    assert figures(before + after) == figures(straight)
    a, b = straight[-1].student.ema, (after or before)[-1].student.ema
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_is_bit_exact_in_half_precision(tmp_path):
    settings = toy_settings(precision="bfloat16")
    straight = run(settings)
    with closing(distill(ToyTeacher(), PLAN, toy_data(), settings, folder=tmp_path)) as records:
        before = list(islice(records, 5))
    assert figures(before + run(settings, folder=tmp_path)) == figures(straight)


def test_interrupted_initialisation_begins_anew(tmp_path):
    class Interrupt(BaseException):
        pass

    teacher = ToyTeacher()

    def interrupted(site):
        raise Interrupt

    teacher.values = interrupted
    with pytest.raises(Interrupt):
        run(teacher=teacher, folder=tmp_path)
    assert not state_files(tmp_path)
    assert figures(run(folder=tmp_path)) == figures(run())


def test_two_states_are_kept_and_no_part(tmp_path):
    run(folder=tmp_path)
    assert len(state_files(tmp_path)) == 2
    locks = {".lock", ".running"}
    assert {p.name for p in tmp_path.iterdir()} - locks == {p.name for p in state_files(tmp_path)}


def test_killed_process_loses_at_most_the_steps_since_the_last_save(tmp_path):
    process = subprocess.Popen([sys.executable, toy.__file__, str(tmp_path), "100000"])
    try:
        wait_for(process, lambda: len(state_files(tmp_path)) == 2)
    finally:
        process.kill()
        process.wait()
    saved = int(state_files(tmp_path)[0].stem.split("-")[1])
    with closing(
        distill(ToyTeacher(), PLAN, toy_data(), toy_settings(100000, 0), folder=tmp_path)
    ) as records:
        first = next(records)
    assert saved >= 2 and first.step == saved + 1 and "resumed" in first.message
    straight = distill(ToyTeacher(), PLAN, toy_data(), toy_settings(100000, 0))
    with closing(straight) as records:
        expected = next(r for r in records if r.stage == "layers" and r.step == first.step)
    assert first.losses == expected.losses


def test_killed_at_any_moment_a_whole_state_is_there(tmp_path):
    """The toy saves at every second of its millisecond steps: most kills meet a save half-way."""
    reached = 0
    for number in range(3):
        process = subprocess.Popen([sys.executable, toy.__file__, str(tmp_path), "100000"])
        try:
            wait_for(process, lambda least=reached + 4: _newest(tmp_path) >= least)
            time.sleep(random.Random(number).uniform(0, 0.02))
        finally:
            process.kill()
            process.wait()
        saved = _newest(tmp_path)
        assert saved >= reached + 4
        with closing(
            distill(ToyTeacher(), PLAN, toy_data(), toy_settings(100000, 0), folder=tmp_path)
        ) as records:
            assert next(records).message == f"resumed after {saved} steps"
        # Closing has saved the step just made.
        reached = saved + 1
        assert _newest(tmp_path) == reached


def _newest(folder):
    """The number of the newest state, 0 where there is none."""
    return max((int(path.stem.split("-")[1]) for path in state_files(folder)), default=0)


def wait_for(process, reached):
    """Until `reached()`: most of a minute where two cores do ten other things."""
    deadline = time.monotonic() + 600
    while not reached():
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda: {"teacher": ToyTeacher(1)}, "base"),
        (lambda: {"gate": "sigmoid"}, "recipe"),
    ],
)
def test_another_base_or_recipe_is_refused_by_name(tmp_path, change, word):
    run(folder=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DistillationError, match=f"state of this {word}"):
        run(folder=tmp_path, **change())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_in_use_is_refused_without_resume(tmp_path):
    run(folder=tmp_path)
    with pytest.raises(DistillationError, match="folder without states"):
        run(folder=tmp_path, resume=False)


def test_more_steps_may_follow_in_the_last_stage(tmp_path):
    for settings, reached in (((3, 0), 3), ((6, 0), 6), ((6, 4), 4)):
        assert run(toy_settings(*settings), folder=tmp_path)[-1].step == reached


def cut(content):
    return content[:-100]


def flip_a_bit(content):
    """Every number stays finite, and what the file holds stays a state."""
    tensors = load(content)
    name = next(name for name in tensors if name.endswith("exp_avg_sq"))
    tensors[name].view(-1)[0] *= 2
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    return save(tensors, metadata)


@pytest.mark.parametrize("damage", [cut, flip_a_bit])
def test_damaged_newest_state_falls_back_to_the_one_before(tmp_path, damage):
    run(folder=tmp_path)
    newest, older = state_files(tmp_path)
    newest.write_bytes(damage(newest.read_bytes()))
    settings = toy_settings(6, 20)
    records = run(settings, folder=tmp_path)
    assert f"resumed after {int(older.stem.split('-')[1])} steps" in records[0].message


def test_nonfinite_loss_is_skipped_then_rate_falls_then_it_stops(tmp_path):
    teacher = ToyTeacher()
    settings = toy_settings(0, 30, init="random", lower_after=2, stop_after=5, save_every=1)
    # Teacher and student each call once per joint step; from the fourth step on all is NaN.
    teacher.poison = set(range(7, 1000))
    seen = []
    with pytest.raises(DistillationError, match="not finite in 5 steps"):
        for record in distill(teacher, PLAN, toy_data(), settings, folder=tmp_path):
            seen.append(record)
    messages = [r.message for r in seen if r.stage == "joint"]
    assert messages[:3] == ["", "", ""]
    assert messages[3] == "loss not finite: step skipped"
    assert "halved" in messages[4]
    rates = [r.lr / rate(settings.joint, r.step - 1) for r in seen if r.stage == "joint"]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.5, 0.5][: len(rates)])
    kept = {n: t for n, t in seen[-1].student.parameters.items()}
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert state_files(tmp_path)


def test_guard_that_stops_leaves_the_last_good_state_and_a_new_count(tmp_path):
    """Nothing but the stop itself saves here."""
    settings = toy_settings(0, 30, init="random", lower_after=9, stop_after=5, save_every=1000)
    teacher = ToyTeacher()
    teacher.poison = set(range(7, 1000))
    with pytest.raises(DistillationError, match="not finite in 5 steps"):
        run(settings, teacher, folder=tmp_path)
    assert state_files(tmp_path)[0].name == "state-00000007.safetensors"
    again = ToyTeacher()
    again.poison = {1, 2}
    records = run(settings, again, folder=tmp_path)
    assert [r.message for r in records[:3]] == [
        "resumed after 7 steps; loss not finite: step skipped",
        "",
        "",
    ]
    assert records[-1].step == 30


def rate(stage, step):
    """The learning rate of a step, counted from 0, as the settings describe it."""
    warm = min(1, (step + 1) / stage.warmup)
    cosine = (1 + math.cos(math.pi * step / stage.steps)) / 2
    return stage.lr * warm * (cosine if stage.schedule == "cosine" else 1)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_warms_up_and_follows_its_schedule(schedule):
    settings = toy_settings(12, 0, init="random")
    stage = replace(settings.layers, schedule=schedule, warmup=3)
    records = run(replace(settings, layers=stage))[1:]
    assert [r.lr for r in records] == pytest.approx([rate(stage, step) for step in range(12)])


def test_each_block_is_clipped_alone():
    settings = toy_settings(1, 0, init="random")
    found = {}
    for record in run(replace(settings, layers=replace(settings.layers, clip=1e-3))):
        for site, block in record.student.blocks.items():
            grads = [p.grad for p in block.parameters() if p.grad is not None]
            found[site] = torch.stack([g.norm() for g in grads]).norm() if grads else None
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norm in found.values())


def test_joint_losses_are_their_formulas():
    teacher, data = ToyTeacher(), toy_data()
    weights = {"noise": 0.5, "teacher": 2.0, "features": 0.25, "normalised_features": 3.0}
    settings = toy_settings(0, 1, init="random", losses=weights)
    (_, record) = run(settings, teacher)
    student = run(toy_settings(0, 0, init="random"))[0].student
    generator = torch.Generator().manual_seed(settings.seed)
    options = {"seed": settings.seed, "batch": 4, "position": 0, "unconditional": 0.1}
    batch = draw(data, teacher, generator, **options)
    inputs, goal, own = (batch.x, batch.sigma, batch.conditions), {}, {}
    with torch.no_grad():
        expected = teacher.predict(*inputs, None, goal)
        got = teacher.predict(*inputs, student.visit, own)
    apart = {site: (own[site] - goal[site]).square().mean().item() for site in PLAN}
    power = {site: goal[site].square().mean().item() for site in PLAN}
    relative = sum(apart[site] / power[site] for site in PLAN) / len(PLAN)
    assert record.losses == pytest.approx(
        {
            "noise": 0.5 * (got - batch.noise).square().mean().item(),
            "teacher": 2.0 * (got - expected).square().mean().item(),
            "features": 0.25 * sum(apart.values()),
            "normalised_features": 3.0 * relative,
        },
        rel=1e-4,
    )
    assert record.loss == pytest.approx(sum(record.losses.values()))


def test_a_share_of_the_images_is_unconditional():
    data, generator = toy_data(), torch.Generator().manual_seed(0)
    dropped = 0
    for position in range(100):
        options = {"seed": 0, "batch": 4, "position": position, "unconditional": 0.25}
        batch = draw(data, ToyTeacher(), generator, **options)
        dropped += sum(condition is data.unconditional for condition in batch.conditions)
    # Six standard deviations of a binomial of 400.
    assert abs(dropped - 100) < 52


def test_refit_lowers_the_layers_error():
    def error(refit):
        settings = toy_settings(6, 12, init="random", init_images=48, losses={"teacher": 1.0})
        layers = replace(settings.layers, refit=refit)
        joint = replace(settings.joint, lr=1e-12)
        records = run(replace(settings, layers=layers, joint=joint))
        return sum(r.loss for r in records[-12:])

    assert error(True) < 0.7 * error(False)


def test_refusals_come_before_any_data_is_drawn():
    def data():
        raise AssertionError("drawn")

    with pytest.raises(DistillationError, match="no self-attention site"):
        distill(ToyTeacher(), {"elsewhere": 3}, data, toy_settings())


def test_data_may_be_drawn_when_it_is_needed():
    records = list(distill(ToyTeacher(), PLAN, toy_data, toy_settings()))
    assert figures(records) == figures(run())


def test_initialisation_tells_its_progress_and_can_be_stopped():
    shares = []
    run(toy_settings(0, 0), progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 4

    def stop(share):
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(toy_settings(0, 0), progress=stop)


def test_single_nonfinite_step_changes_no_weight():
    teacher = ToyTeacher()
    settings = toy_settings(0, 4, init="random")
    teacher.poison = {3}
    weights = []
    for record in distill(teacher, PLAN, toy_data(), settings):
        weights.append({n: t.detach().clone() for n, t in record.student.parameters.items()})
    assert all(torch.equal(weights[1][n], weights[2][n]) for n in weights[1])
    assert not all(torch.equal(weights[2][n], weights[3][n]) for n in weights[1])


def test_out_of_memory_halves_the_micro_batch_once_and_says_so():
    teacher = ToyTeacher()
    settings = toy_settings(0, 6, init="random", losses={"teacher": 1.0})
    expected = run(settings)
    teacher.most_images = 2
    records = run(settings, teacher)
    assert "2 images at a time" in records[1].message
    assert not any(r.message for r in records[2:])
    for record, other in zip(records, expected, strict=True):
        assert record.loss == pytest.approx(other.loss, rel=1e-4)
    teacher.most_images = 1
    with pytest.raises(torch.OutOfMemoryError):
        run(settings, teacher)


def test_accumulation_gives_the_joint_gradient_of_the_whole_batch():
    def last(accumulate):
        settings = toy_settings(0, 5, init="random", losses={"teacher": 1.0})
        joint = replace(settings.joint, accumulate=accumulate)
        return run(replace(settings, joint=joint))[-1].loss

    assert last(2) == pytest.approx(last(1), rel=1e-4)


def test_min_snr_lowers_the_loss_of_nearly_clean_images():
    base = toy_settings(0, 1, init="random", losses={"teacher": 1.0})
    plain, weighted = run(base)[-1].loss, run(replace(base, min_snr=1.0))[-1].loss
    assert 0 < weighted < plain


def test_base_gets_no_gradient_and_stays_the_same():
    teacher = ToyTeacher()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    run(teacher=teacher)
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_weights_round_trip_through_a_file(tmp_path):
    settings = toy_settings()
    record = run(settings)[-1]
    teacher = ToyTeacher()
    weights = weights_of(record.student, teacher, settings, steps=11)
    path = write_weights(weights, tmp_path / "toy.safetensors")
    read = read_weights(path)
    assert read.base_model == "a toy" and read.training["steps"] == 11
    assert DistillationSettings.from_mapping(read.training["settings"]) == settings
    x = torch.randn(1, 5, 7, toy.CHANNELS)
    block = record.student.averaged_blocks()["first"]
    assert torch.equal(read.block("first")(x), block(x))


def test_joint_stage_is_refused_where_gradients_cannot_pass():
    teacher = ToyTeacher()
    teacher.why_not_differentiable = "the test said so."
    with pytest.raises(DistillationError, match="the test said so"):
        run(teacher=teacher)
    assert run(toy_settings(2, 0), teacher)


def test_log_lines_are_json():
    teacher = ToyTeacher()
    # The first joint step's student: five calls of the initialization, six of the layers before.
    teacher.poison = {13}
    lines = [json.dumps(r.to_mapping(), allow_nan=False) for r in run(teacher=teacher)]
    assert any(json.loads(line)["loss"] is None for line in lines)
    lines = [json.dumps(r.to_mapping(), allow_nan=False) for r in run()]
    assert json.loads(lines[-1])["stage"] == "joint"
    assert set(json.loads(lines[1])["losses"]) == set(PLAN)


def test_stage_settings_fill_from_plain_data():
    settings = DistillationSettings.from_mapping({"layers": {"steps": 5, "betas": [0.9, 0.95]}})
    assert settings.layers == StageSettings(5, betas=(0.9, 0.95))
