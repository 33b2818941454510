"""The distillation's guards, where they meet each other: states, memory, batches, optimizers."""

from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch
import toy_teacher as toy
from comfyui_deltaconv.deltaconv.distillation import DistillationError, distill
from comfyui_deltaconv.deltaconv.distillation.checkpoint import state_files
from comfyui_deltaconv.deltaconv.distillation.own_samples import own_samples

PLAN, ToyTeacher, toy_data, toy_settings = toy.PLAN, toy.ToyTeacher, toy.toy_data, toy.toy_settings


def run(settings=None, teacher=None, **options):
    settings = settings or toy_settings()
    return list(distill(teacher or ToyTeacher(), PLAN, toy_data(), settings, **options))


def losses(records):
    """Of the training steps; a run resumed at its end only says that it is complete."""
    return [(r.stage, r.step, r.loss) for r in records if r.stage != "init" and r.losses]


def with_stage(settings, **changes):
    """Both stages with `changes`."""
    return replace(
        settings,
        layers=replace(settings.layers, **changes),
        joint=replace(settings.joint, **changes),
    )


def test_initialisation_is_as_good_image_by_image():
    """The held-out half is chosen by image, also where a batch is one image."""
    together = run(toy_settings(0, 0, init_images=48))[0]
    alone = run(with_stage(toy_settings(0, 0, init_images=48), batch=1))[0]
    for site in PLAN:
        # Other images at other noise levels, so only of one size.
        assert together.losses[site] / 4 < alone.losses[site] < together.losses[site] * 4


def test_initialisation_computes_a_batch_in_its_parts():
    teacher = ToyTeacher()
    teacher.most_images = 2
    records = run(with_stage(toy_settings(2, 2), accumulate=2), teacher)
    assert not any(record.message for record in records)


def test_initialisation_halves_the_batch_when_memory_runs_out():
    teacher = ToyTeacher()
    teacher.most_images = 2
    records = run(toy_settings(2, 2), teacher)
    assert records[0].stage == "init" and "2 images at a time" in records[0].message
    assert not any(record.message for record in records[1:])
    assert records[0].losses == run(with_stage(toy_settings(0, 0), accumulate=2))[0].losses
    teacher.most_images = 1
    with pytest.raises(torch.OutOfMemoryError):
        run(toy_settings(2, 2), teacher)


def test_interrupt_within_an_update_saves_no_half_made_step(tmp_path, monkeypatch):
    straight = run()
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        run(folder=tmp_path)
    after = run(folder=tmp_path)
    assert losses(after) == losses(straight)[-len(losses(after)) :]
    assert len(losses(after)) == len(losses(straight)) - 2


def test_gradients_that_never_become_finite_stop_half_precision_too():
    seen = []
    with pytest.raises(DistillationError, match="not finite in 5 steps"):
        settings = toy_settings(200, 0, precision="float16", init="random", stop_after=5)
        for record in distill(ToyTeacher(), PLAN, toy_data(), settings):
            if record.stage == "init":
                for parameter in record.student.parameters.values():
                    parameter.register_hook(lambda gradient: gradient * float("nan"))
            seen.append(record)
    assert len(seen) < 60


def test_half_precision_survives_the_search_for_its_scale():
    records = run(toy_settings(40, 0, precision="float16", init="random"))
    assert sum(r.loss for r in records[-5:]) < 0.9 * sum(r.loss for r in records[1:6])
    assert not any(record.message for record in records)


class HalfBase(ToyTeacher):
    """A base that computes in float16, where the gradients of a small loss underflow."""

    dtype = torch.float16

    def predict(self, x, sigma, conditions, visit=None, features=None):
        eps = super().predict(x, sigma, conditions, visit, features)
        if eps.requires_grad:
            eps.register_hook(lambda gradient: gradient.half().to(gradient))
        return eps


def test_joint_gradients_pass_through_a_half_precision_base():
    settings = toy_settings(0, 3, init="random", losses={"teacher": 1e-4})
    start = run(toy_settings(0, 0, init="random"))[-1].student.parameters

    def moved(teacher):
        parameters = run(settings, teacher)[-1].student.parameters
        return {n: (p - start[n]).detach().abs().mean().item() for n, p in parameters.items()}

    expected = moved(ToyTeacher())
    assert all(expected.values())
    assert moved(HalfBase()) == pytest.approx(expected, rel=0.1)


def test_newest_state_outlives_damaged_ones_with_higher_numbers(tmp_path):
    run(toy_settings(4, 0), folder=tmp_path)
    for number in (70_000_000, 80_000_000):
        (tmp_path / f"state-{number}.safetensors").write_bytes(b"damaged")
    run(toy_settings(6, 0), folder=tmp_path)
    records = run(toy_settings(8, 0), folder=tmp_path)
    assert "resumed after 6 steps" in records[0].message


def test_states_beyond_eight_digits_are_found_and_ordered(tmp_path):
    for number in (99_999_998, 100_000_000, 9):
        (tmp_path / f"state-{number:08d}.safetensors").touch()
    numbers = [int(path.stem.removeprefix("state-")) for path in state_files(tmp_path)]
    assert numbers == [100_000_000, 99_999_998, 9]


@pytest.fixture
def wide(monkeypatch):
    """Blocks large enough for bitsandbytes to quantize their moments."""
    monkeypatch.setattr(toy, "CHANNELS", 128)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("stop", [2, 3, 8])
def test_eight_bit_resumes_bit_for_bit(tmp_path, stop):
    settings = toy_settings(eight_bit=True)
    straight = run(settings)
    assert losses(straight) != losses(run())
    with closing(distill(ToyTeacher(), PLAN, toy_data(), settings, folder=tmp_path)) as records:
        before = list(islice(records, stop))
    after = run(settings, folder=tmp_path)
    assert losses(before) + losses(after) == losses(straight)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("eight_bit", [False, True])
def test_another_optimizer_begins_anew_and_says_so(tmp_path, eight_bit):
    run(toy_settings(4, 0, eight_bit=not eight_bit), folder=tmp_path)
    records = run(toy_settings(8, 0, eight_bit=eight_bit), folder=tmp_path)
    assert records[-1].step == 8 and "optimizer begun anew" in records[0].message


def test_own_samples_of_another_negative_are_drawn_anew(tmp_path):
    def first(name, value):
        data = own_samples(
            ToyTeacher(),
            [torch.ones(toy.CHANNELS)],
            ["a"],
            torch.full((toy.CHANNELS,), value),
            (3, 4, 4),
            count=1,
            steps=4,
            cache=tmp_path,
            unconditional_name=name,
        )
        return data.latents[0]

    assert not torch.equal(first("empty", 0.0), first("ugly", -1.0))
    assert torch.equal(first("empty", 0.0), first("empty", 0.0))


def test_blocks_to_start_from_are_kept_and_the_others_initialised():
    settings = toy_settings(0, 0, init_images=32)
    whole = run(settings)[0]
    other = run(toy_settings(0, 0, init="random", seed=3))[0].student.averaged_blocks()["first"]
    record = run(settings, start={"first": other})[0]
    found = record.student.averaged_blocks()["first"].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in other.state_dict().items())
    # Other queries are picked to measure where its site looks.
    assert record.losses == {"second": pytest.approx(whole.losses["second"], rel=0.2)}


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulation_gives_the_layers_gradients_of_the_whole_batch(accumulate):
    """Images differ in power, so a part's own power would not do; also in parts of unequal size."""

    def gradients(parts):
        settings = toy_settings(1, 0, init="random")
        layers = replace(settings.layers, accumulate=parts, clip=1e9)
        found = {}
        for record in distill(ToyTeacher(), PLAN, toy_data(), replace(settings, layers=layers)):
            found |= {n: p.grad.clone() for n, p in record.student.parameters.items() if record.lr}
        return record.losses, found

    (losses, whole), (again, parts) = gradients(1), gradients(accumulate)
    assert again == pytest.approx(losses, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)
