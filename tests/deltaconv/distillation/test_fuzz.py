"""Broken settings, recipes, data sets and states: a clear error each time, and no damage."""

import json
import random
import shutil
import struct

import pytest
import torch
import toy_teacher as toy
from comfyui_deltaconv.cli import CommandError
from comfyui_deltaconv.cli.distill_config import read_configuration
from comfyui_deltaconv.deltaconv.distillation import (
    PRESETS,
    Dataset,
    DistillationError,
    DistillationSettings,
    StageSettings,
    distill,
)
from comfyui_deltaconv.deltaconv.distillation.checkpoint import state_files
from comfyui_deltaconv.deltaconv.distillation.data import draw
from comfyui_deltaconv.deltaconv.distillation.own_samples import own_samples
from comfyui_deltaconv.deltaconv.distillation.settings import read_plan
from comfyui_deltaconv.deltaconv.geometry import BlockPlan

LONG = pytest.param(10_000, marks=pytest.mark.long)
ODD = [None, True, -1, 0, 2, 1.5, 10**30, float("nan"), float("inf"), "", "x" * 500, [], {}, [[]]]


def mutated(value, rng, depth=0):
    """`value` with one part of it replaced, removed, renamed or added."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.7):
        copy = dict(value)
        key = rng.choice(list(copy))
        action = rng.randrange(4)
        if action == 0:
            del copy[key]
        elif action == 1:
            copy[rng.choice(["", "no such entry", key + "x"])] = copy.pop(key)
        elif action == 2:
            copy[rng.choice(["extra", key])] = rng.choice(ODD)
        else:
            copy[key] = mutated(copy[key], rng, depth + 1)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.5:
        copy = list(value)
        copy[rng.randrange(len(copy))] = rng.choice(ODD)
        return copy
    return rng.choice(ODD)


@pytest.mark.parametrize("count", [300, LONG])
def test_settings_are_read_or_refused(count):
    rng, refused = random.Random(0), 0
    for _ in range(count):
        plain = mutated(rng.choice(list(PRESETS.values()))().to_mapping(), rng)
        try:
            found = DistillationSettings.from_mapping(plain)
        except DistillationError as error:
            refused += 1
            assert len(str(error)) < 1000
            assert "distillation settings" in str(error) or "by name" in str(error)
        else:
            assert DistillationSettings.from_mapping(found.to_mapping()) == found
    assert refused > count / 4


@pytest.mark.parametrize("count", [300, LONG])
def test_recipes_are_read_or_refused(count):
    rng, refused, dims = random.Random(1), 0, dict.fromkeys(toy.PLAN, toy.CHANNELS)
    for _ in range(count):
        recipe = {"first": [5, [1.0, 0.5]], "second": 3}
        for _ in range(rng.randint(1, 3)):
            recipe = mutated(recipe, rng)
        try:
            plans = read_plan(recipe, dims)
        except DistillationError as error:
            refused += 1
            assert len(str(error)) < 3000
        else:
            assert all(isinstance(plan, BlockPlan) and plan.kernel % 2 for plan in plans.values())
    assert refused > count / 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    for _ in distill(toy.ToyTeacher(), toy.PLAN, toy.toy_data(), quick(), folder=folder):
        pass
    return folder


def quick(layers=2, joint=1):
    return toy.toy_settings(layers, joint, init="random", save_every=1)


def break_file(path, rng):
    """Cut, flip, overwrite, or lie in the header of a safetensors file."""
    data = bytearray(path.read_bytes())
    action = rng.randrange(5)
    if action == 0:
        data = data[: rng.randrange(len(data))]
    elif action == 1:
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif action == 2:
        data = bytearray(rng.randbytes(rng.randrange(200)))
    elif action == 3:
        at = rng.randrange(len(data))
        data[at : at + 8] = struct.pack("<d", float("nan"))
    else:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"] = mutate_metadata(header["__metadata__"], rng)
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + bytes(data[8 + length :])
    path.write_bytes(bytes(data))


def mutate_metadata(metadata, rng):
    name = rng.choice(["deltaconv.progress", "deltaconv.identity", "deltaconv.state"])
    if name == "deltaconv.state":
        return {**metadata, name: rng.choice(["2", "", "x"])}
    return {**metadata, name: json.dumps(mutated(json.loads(metadata[name]), rng))}


@pytest.mark.parametrize("count", [60, LONG])
def test_broken_states_are_taken_up_or_refused_and_never_overwritten(saved, tmp_path, count):
    rng, outcomes = random.Random(2), {"refused": 0, "taken up": 0}
    for _ in range(count):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        for path in state_files(folder)[: rng.randint(1, 2)]:
            break_file(path, rng)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        try:
            records = distill(
                toy.ToyTeacher(), toy.PLAN, toy.toy_data(), quick(3, 1), folder=folder
            )
        except DistillationError as error:
            outcomes["refused"] += 1
            assert str(folder) in str(error) and len(str(error)) < 2000
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        else:
            outcomes["taken up"] += 1
            for record in records:
                assert record.loss == record.loss
    assert all(outcomes.values()), outcomes


@pytest.mark.parametrize("count", [100, LONG])
def test_data_sets_are_drawn_or_refused(count):
    rng, refused, teacher = random.Random(3), 0, toy.ToyTeacher()
    for _ in range(count):
        images = rng.randint(0, 5)
        latents = [torch.zeros(3, rng.choice([1, 4, 7]), rng.choice([1, 4])) for _ in range(images)]
        if images and rng.random() < 0.3:
            latents[0] = rng.choice([torch.zeros(3, 4), torch.full((3, 4, 4), float("nan"))])
        conditions = [torch.zeros(toy.CHANNELS)] * rng.choice([0, 1, images, images + 1])
        try:
            data = Dataset(latents, conditions, torch.zeros(toy.CHANNELS))
        except DistillationError:
            refused += 1
            continue
        size = rng.randint(1, 9)
        for position in range(4):
            batch = draw(
                data,
                teacher,
                torch.Generator().manual_seed(position),
                seed=rng.randrange(2**63),
                batch=size,
                position=position,
                unconditional=0.5,
            )
            assert len(batch) == size and batch.x.isfinite().all()
    assert 0 < refused < count


@pytest.mark.parametrize("count", [100, LONG])
def test_configurations_are_read_or_refused(tmp_path, count):
    rng, refused = random.Random(4), 0
    path = tmp_path / "x.yaml"
    whole = "model: demo\nprompts: [a, b]\nsamples: 4\nsettings:\n  layers: {steps: 3}\nsize: 64\n"
    for _ in range(count):
        text = list(whole)
        for _ in range(rng.randint(1, 6)):
            text[rng.randrange(len(text))] = rng.choice(":[]{}#&*!|>'\"%@`\n\t0x\x00é")
        path.write_text("".join(text), encoding="utf-8")
        try:
            read_configuration(path)
        except CommandError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused


def test_every_image_comes_once_per_epoch():
    data = toy.toy_data(12)
    seen = [index for position in range(3) for index in data.indices(7, 4, position)]
    assert sorted(seen) == list(range(12))
    assert [data.indices(7, 4, p) for p in range(3, 6)] != [data.indices(7, 4, p) for p in range(3)]


def test_draws_do_not_depend_on_what_was_drawn_before():
    first, second = toy.toy_data(), toy.toy_data()
    for position in range(40):
        first.indices(0, 4, position)
    assert first.indices(0, 4, 5) == second.indices(0, 4, 5)


def test_own_samples_fit_their_limit_and_outlive_a_damaged_cache(tmp_path):
    teacher, conditions = toy.ToyTeacher(), list(torch.zeros(2, toy.CHANNELS))
    options = {"count": 6, "steps": 8, "batch": 2, "cache": tmp_path, "cfg": 1.0}
    arguments = (teacher, conditions, ["a", "b"], torch.zeros(toy.CHANNELS), (3, 8, 8))
    heard = []
    whole = own_samples(*arguments, **options, progress=lambda *told: heard.append(told))
    assert heard == [(step, 24) for step in range(1, 25)]
    calls = teacher.calls
    again = own_samples(*arguments, **options)
    assert teacher.calls == calls
    assert all(map(torch.equal, whole.latents, again.latents))
    newest = sorted(tmp_path.iterdir())[1]
    newest.write_bytes(newest.read_bytes()[:-7])
    repaired = own_samples(*arguments, **options)
    assert teacher.calls > calls
    assert all(map(torch.equal, whole.latents, repaired.latents))
    limit = 6 * 2 * 3 * 8 * 8 * 4
    # Room for three points, were it not for the files' headers.
    few = own_samples(*arguments, **options, max_bytes=limit)
    assert all(len(path.sigma) == 2 for path in few.trajectories)
    (tmp_path / ".samples-killed.part").write_bytes(b"half a file")
    for batch in (1, 4, 3, 2, 5, 6):
        own_samples(*arguments, **{**options, "batch": batch}, max_bytes=limit)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    with pytest.raises(DistillationError, match="room for 6 samples"):
        own_samples(*arguments, **options, max_bytes=100)


def test_trajectory_points_are_trained_on():
    teacher, conditions = toy.ToyTeacher(), list(torch.zeros(2, toy.CHANNELS))
    data = own_samples(
        teacher, conditions, ["a", "b"], torch.zeros(toy.CHANNELS), (3, 8, 8), count=4, cfg=1.0
    )
    batch = draw(
        data,
        teacher,
        torch.Generator().manual_seed(0),
        seed=0,
        batch=4,
        position=0,
        unconditional=0.0,
        trajectory_share=1.0,
    )
    points = torch.cat([path.x for path in data.trajectories]).float()
    assert all((points == x).flatten(1).all(1).any() for x in batch.x)


def test_stage_settings_that_cannot_be_are_all_named():
    with pytest.raises(DistillationError) as error:
        DistillationSettings(layers=StageSettings(-1, lr=0.0, schedule="linear", batch=0))
    for word in ("layers.steps", "layers.lr", "layers.schedule", "layers.batch"):
        assert word in str(error.value)


def test_every_unknown_entry_and_every_wrong_value_is_named_at_once():
    plain = {
        "layers": {"lr": "fast", "betas": [0.9], "accumulate": 9, "nope": 1},
        "joint": {"steps": True, "schedule": "linear"},
        "losses": {"noise": -1, "style": 1.0},
        "seed": 1.0,
        "ema": 1,
        "other": None,
    }
    with pytest.raises(DistillationError) as error:
        DistillationSettings.from_mapping(plain)
    assert str(error.value) == (
        "These distillation settings cannot be: "
        "layers.lr: expected a number, got 'fast'; "
        "layers.accumulate: expected at most the batch, 8, got 9; "
        "layers.betas: expected two numbers, got [0.9]; "
        "unknown: layers.nope; "
        "joint.steps: expected a whole number, got True; "
        "joint.schedule: expected 'cosine' or 'constant', got 'linear'; "
        "losses.noise: expected a number, at least 0, got -1; "
        "losses.style: expected 'noise', 'teacher', 'guided', 'features' or 'normalised_features', "
        "got 'style'; "
        "ema: expected a number, below 1, got 1; "
        "seed: expected a whole number, got 1.0; "
        "unknown: other."
    )
    with pytest.raises(DistillationError, match="one with a weight above 0 for the joint stage"):
        DistillationSettings(joint=StageSettings(1), losses={"noise": 0})
    whole = DistillationSettings.from_mapping({"min_snr": 5, "layers": {"betas": [0, 0.5]}})
    assert whole.min_snr == 5.0 and whole.layers.betas == (0.0, 0.5)


def test_what_a_recipe_may_say_of_a_site():
    dims = dict.fromkeys("abc", toy.CHANNELS)
    plans = read_plan({"c": BlockPlan(7, (1.0,), (0,)), "a": 3, "b": [5, [1, 0.25], 2]}, dims)
    assert plans == {
        "a": BlockPlan(3),
        "b": BlockPlan(5, (1.0, 0.25), heads=2),
        "c": BlockPlan(7, (1.0,), (0,)),
    }
    assert list(plans) == ["a", "b", "c"]
    with pytest.raises(DistillationError) as error:
        read_plan({"a": 4, "b": (65, [2]), "c": [3], "d": 3}, dims)
    for words in (
        "a: kernel_size must be odd and positive, got kernel_size=4",
        "b: kernel: expected a number, at most 63, got 65",
        "b: scales.0: expected a number, at most 1, got 2",
        "c: expected [kernel, [scales]] or [kernel, [scales], heads], got [3]",
        "'d' is no self-attention site of this model",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("scales", ["1", {1.0}, iter([1.0]), {1.0: 1.0}])
def test_scales_are_in_an_order(scales):
    with pytest.raises(DistillationError, match="a: scales: expected a list, got"):
        read_plan({"a": (3, scales)}, {"a": toy.CHANNELS})
