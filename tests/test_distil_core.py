"""The distillation's core on a toy teacher: stages, guards, states, resuming."""

import importlib.util
import json
import struct
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from comfyui_deltaconv.deltaconv import read_weights, write_weights
from comfyui_deltaconv.deltaconv.distil import (
    DistilError,
    DistilSettings,
    StageSettings,
    distil,
    weights_of,
)
from comfyui_deltaconv.deltaconv.distil.data import draw
from comfyui_deltaconv.deltaconv.distil.state import state_files
from safetensors.torch import load, save

TOY = Path(__file__).with_name("toy_teacher.py")
spec = importlib.util.spec_from_file_location("toy_teacher", TOY)
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
PLAN, ToyTeacher, toy_data, toy_settings = toy.PLAN, toy.ToyTeacher, toy.toy_data, toy.toy_settings


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(settings=None, teacher=None, **options):
    settings = settings or toy_settings()
    return list(distil(teacher or ToyTeacher(), PLAN, toy_data(), settings, **options))


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


def test_same_seed_same_losses_and_another_seed_others():
    first, second = run(), run()
    assert figures(first) == figures(second)
    assert figures(run(toy_settings(seed=1))) != figures(first)


@pytest.mark.parametrize("stop", [1, 2, 5, 7, 9, 12])
def test_resume_is_bit_exact(tmp_path, stop):
    straight = run()
    with closing(
        distil(ToyTeacher(), PLAN, toy_data(), toy_settings(), folder=tmp_path)
    ) as records:
        before = list(islice(records, stop))
    after = run(folder=tmp_path)
    assert figures(before + after) == figures(straight)
    a, b = straight[-1].student.ema, (after or before)[-1].student.ema
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_is_bit_exact_in_half_precision(tmp_path):
    settings = toy_settings(precision="bfloat16")
    straight = run(settings)
    with closing(distil(ToyTeacher(), PLAN, toy_data(), settings, folder=tmp_path)) as records:
        before = list(islice(records, 5))
    assert figures(before + run(settings, folder=tmp_path)) == figures(straight)


def test_interrupted_initialisation_begins_anew(tmp_path):
    class Interrupt(BaseException):
        pass

    teacher = ToyTeacher()

    def interrupted(site):
        raise Interrupt

    teacher.projections = interrupted
    with pytest.raises(Interrupt):
        run(teacher=teacher, folder=tmp_path)
    assert not state_files(tmp_path)
    assert figures(run(folder=tmp_path)) == figures(run())


def test_two_states_are_kept_and_no_part(tmp_path):
    run(folder=tmp_path)
    assert len(state_files(tmp_path)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        p.name for p in state_files(tmp_path)
    )


def test_killed_process_loses_at_most_the_steps_since_the_last_save(tmp_path):
    process = subprocess.Popen([sys.executable, str(TOY), str(tmp_path), "100000"])
    try:
        deadline = time.monotonic() + 60
        while len(state_files(tmp_path)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    saved = int(state_files(tmp_path)[0].stem.split("-")[1])
    with closing(
        distil(ToyTeacher(), PLAN, toy_data(), toy_settings(100000, 0), folder=tmp_path)
    ) as records:
        first = next(records)
    assert saved >= 2 and first.step == saved + 1 and "resumed" in first.message
    straight = distil(ToyTeacher(), PLAN, toy_data(), toy_settings(100000, 0))
    with closing(straight) as records:
        expected = next(r for r in records if r.stage == "layers" and r.step == first.step)
    assert first.losses == expected.losses


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
    with pytest.raises(DistilError, match=f"state of this {word}"):
        run(folder=tmp_path, **change())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_in_use_is_refused_without_resume(tmp_path):
    run(folder=tmp_path)
    with pytest.raises(DistilError, match="folder without states"):
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
    with pytest.raises(DistilError, match="not finite in 5 steps"):
        for record in distil(teacher, PLAN, toy_data(), settings, folder=tmp_path):
            seen.append(record)
    messages = [r.message for r in seen if r.stage == "joint"]
    assert messages[:3] == ["", "", ""]
    assert messages[3] == "loss not finite: step skipped"
    assert "halved" in messages[4]
    kept = {n: t for n, t in seen[-1].student.parameters.items()}
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert state_files(tmp_path)


def test_single_nonfinite_step_changes_no_weight():
    teacher = ToyTeacher()
    settings = toy_settings(0, 4, init="random")
    teacher.poison = {3}
    weights = []
    for record in distil(teacher, PLAN, toy_data(), settings):
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
    assert DistilSettings.from_mapping(read.training["settings"]) == settings
    x = torch.randn(1, 5, 7, toy.CHANNELS)
    block = record.student.averaged_blocks()["first"]
    assert torch.equal(read.block("first")(x), block(x))


def test_joint_stage_is_refused_where_gradients_cannot_pass():
    teacher = ToyTeacher()
    teacher.why_not_differentiable = "the test said so."
    with pytest.raises(DistilError, match="the test said so"):
        run(teacher=teacher)
    assert run(toy_settings(2, 0), teacher)


def test_log_lines_are_json():
    lines = [json.dumps(r.to_mapping()) for r in run()]
    assert json.loads(lines[-1])["stage"] == "joint"
    assert set(json.loads(lines[1])["losses"]) == set(PLAN)


def test_stage_settings_fill_from_plain_data():
    settings = DistilSettings.from_mapping({"layers": {"steps": 5, "betas": [0.9, 0.95]}})
    assert settings.layers == StageSettings(5, betas=(0.9, 0.95))
