"""Many processes take the steps that one takes: losses, weights, states; kills and stalls."""

import json
import os
import random
import signal
import time

import psutil
import pytest
import toy_teacher as toy
from comfyui_deltaconv.deltaconv import read_weights
from comfyui_deltaconv.deltaconv.distillation import DistillationError, StageSettings, distill
from comfyui_deltaconv.deltaconv.distillation.checkpoint import state_files
from comfyui_deltaconv.deltaconv.scale.checkpoint import sharded_states
from comfyui_deltaconv.deltaconv.scale.engine import (
    OneProcessEngine,
    ParallelEngine,
    chosen_engine,
)
from launched import finished
from toy_parallel import toy_run, toy_sizes

# Losses whose denominators are the whole batch's, and others; both ways of dropping a condition.
DEFAULT = '{"teacher":1.0,"normalised_features":0.3}'
OTHER = '{"noise":0.5,"guided":1.0,"features":0.001}'


def seen_by(folder, rank=0):
    return json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))


def losses(records):
    return {(r["stage"], r["step"]): r["loss"] for r in records if "complete" not in str(r)}


def one_process(layers, joint, folder=None, **entries):
    """The records of this process alone, going on with what `folder` holds."""
    changes = {name: json.loads(str(value)) for name, value in entries.items()}
    stop = changes.pop("stop", None)
    engine = chosen_engine(folder) if folder else None
    return toy_run(layers, joint, changes, folder, engine, stop)[0]


def assert_same_curve(records, expected):
    found, expected = losses(records), losses(expected)
    assert found.keys() == expected.keys()
    for step, loss in found.items():
        assert abs(loss - expected[step]) < 1e-5, step


def test_two_processes_take_the_steps_of_one_which_then_goes_on(tmp_path, start_toy):
    finished(start_toy(2, 20, 23, losses=DEFAULT, save_every=19, stop="[1,39]"))
    found = [seen_by(tmp_path, rank) for rank in range(2)]
    assert found[0]["weights"] == found[1]["weights"]
    assert losses(found[0]["records"]) == losses(found[1]["records"])
    # Rank 1 asked after step 39: both stopped after the next one, and saved.
    assert [each["records"][-1]["number"] for each in found] == [40, 40]
    newest, before = sharded_states(tmp_path / "state")
    assert (newest.name, before.name) == ("state-00000040-001", "state-00000038-001")
    assert len(list((newest / "training").iterdir())) == 2
    weights = read_weights(newest / "deltaconv.safetensors")
    assert len(weights.sites) == 2 and weights.training["steps"] == 40
    rest = one_process(20, 23, tmp_path / "state", losses=DEFAULT, save_every=19)
    assert rest[0]["message"] == "resumed after 40 steps"
    assert_same_curve([*found[0]["records"], *rest], one_process(20, 23, losses=DEFAULT))


# Blocks that start at random call the teacher for the first kept pass before anything else does.
@pytest.mark.parametrize(("init", "layers"), [("informed", 4), ("random", 4), ("random", 0)])
@pytest.mark.parametrize("updates", [1, 3])
def test_the_engine_of_one_process_takes_its_steps_and_says_where_memory_ends(
    updates, init, layers
):
    teacher, engine = toy.ToyTeacher(), ParallelEngine()
    losses = {"teacher": 1.0, "normalised_features": 0.3}
    settings = toy.toy_settings(layers, 4, losses=losses, updates=updates, init=init)

    def run(engine=None):
        records = distill(teacher, toy.PLAN, toy_sizes(), settings, engine=engine)
        return [record.loss for record in records]

    assert run(engine) == pytest.approx(run(), abs=1e-6)
    teacher.most_images = 3
    with pytest.raises(DistillationError, match=r"memory for 4 images in 1 parts.*accumulate"):
        run(engine)


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "entries"),
    [
        (2, {"losses": OTHER, "min_snr": 5.0}),
        (4, {"losses": DEFAULT}),
        (4, {"losses": OTHER, "accumulate": 2, "min_snr": 5.0}),
        # Shares of one and two images.
        (3, {"losses": DEFAULT, "accumulate": 2}),
        (2, {"losses": DEFAULT, "updates": 4, "kept_gib": 5e-4}),
        (3, {"losses": DEFAULT, "updates": 2, "kept_gib": 5e-4}),
    ],
)
def test_many_processes_have_the_losses_of_one(tmp_path, start_toy, count, entries):
    finished(start_toy(count, 20, 20, **entries))
    alone = one_process(20, 20, **entries)
    found = [seen_by(tmp_path, rank) for rank in range(count)]
    for each in found:
        assert_same_curve(each["records"], alone)
        assert each["weights"] == found[0]["weights"]


@pytest.mark.long
def test_a_run_of_four_goes_on_with_two(tmp_path, start_toy):
    finished(start_toy(4, 9, 9, losses=DEFAULT, stop="[2,5]"))
    first = seen_by(tmp_path)["records"]
    assert [seen_by(tmp_path, rank)["records"][-1]["number"] for rank in range(4)] == [6] * 4
    finished(start_toy(2, 9, 9, losses=DEFAULT))
    second = seen_by(tmp_path)["records"]
    assert second[0]["message"] == "resumed after 6 steps"
    assert_same_curve([*first, *second], one_process(9, 9, losses=DEFAULT))


def test_a_state_of_one_process_is_taken_up_by_the_others_and_the_newest_counts(tmp_path):
    one_process(4, 0, tmp_path, losses=DEFAULT, stop="[0,3]")
    assert state_files(tmp_path)[0].name == "state-00000003.safetensors"
    teacher, plan, data = toy.ToyTeacher(), toy.PLAN, toy_sizes()

    def run(steps, engine):
        settings = toy.toy_settings(steps, 0, losses={"teacher": 1.0})
        return list(distill(teacher, plan, data, settings, folder=tmp_path, engine=engine))

    assert "resumed after 3 steps" in run(6, OneProcessEngine())[0].message
    assert sharded_states(tmp_path)[0].name == "state-00000006-001"
    assert "resumed after 6 steps" in run(7, chosen_engine(tmp_path))[0].message


def test_damaged_states_give_way_to_the_one_before(tmp_path):
    teacher, plan, data = toy.ToyTeacher(), toy.PLAN, toy_sizes()

    def run(steps):
        settings = toy.toy_settings(steps, 0)
        return list(
            distill(teacher, plan, data, settings, folder=tmp_path, engine=OneProcessEngine())
        )

    run(6)
    newest, _ = sharded_states(tmp_path)
    shard = next((newest / "training").iterdir())
    changed = bytearray(shard.read_bytes())
    changed[-1] ^= 1
    shard.write_bytes(changed)
    assert run(6)[0].message == "resumed after 4 steps"
    for path in sharded_states(tmp_path):
        (path / "state.json").write_text('{"format": "1"}', encoding="utf-8")
    with pytest.raises(DistillationError, match="2 damaged"):
        run(6)
    with pytest.raises(DistillationError, match="folder without states"):
        settings = toy.toy_settings(6, 0)
        distill(
            teacher, plan, data, settings, folder=tmp_path, resume=False, engine=OneProcessEngine()
        )


def test_another_base_is_refused(tmp_path):
    settings = toy.toy_settings(2, 0)
    arguments = {"folder": tmp_path, "engine": OneProcessEngine()}
    list(distill(toy.ToyTeacher(), toy.PLAN, toy_sizes(), settings, **arguments))
    with pytest.raises(DistillationError, match="state of this base"):
        distill(toy.ToyTeacher(1), toy.PLAN, toy_sizes(), settings, **arguments)


def children(process):
    """The processes that torchrun started, once they are there."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [one for one in found if "toy_parallel.py" in " ".join(one.cmdline())]


def newest_steps(folder):
    states = sharded_states(folder / "state")
    return int(states[0].name.split("-")[1]) if states else 0


def wait_until(process, reached):
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.01)


def killed_once(tmp_path, start_toy, number):
    """Kill −9 one rank at a random moment; the rest must end, and what is left must resume."""
    chance = random.Random(number)
    before = newest_steps(tmp_path)
    process = start_toy(2, 100000, 0, save_every=1)
    wait_until(process, lambda: newest_steps(tmp_path) >= before + 3)
    time.sleep(chance.uniform(0, 0.05))
    chance.choice(children(process)).kill()
    began = time.monotonic()
    finished(process, 1)
    assert time.monotonic() - began < 60
    return newest_steps(tmp_path)


def test_a_killed_process_ends_the_job_and_leaves_a_whole_state(tmp_path, start_toy):
    saved = killed_once(tmp_path, start_toy, 0)
    rest = one_process(100000, 0, tmp_path / "state", save_every=1, stop=f"[0,{saved + 1}]")
    assert rest[0]["message"] == f"resumed after {saved} steps"


@pytest.mark.long
def test_twenty_kills_at_random_moments_each_leave_a_whole_state(tmp_path, start_toy):
    for number in range(20):
        saved = killed_once(tmp_path, start_toy, number)
        finished(start_toy(1 + number % 3, 100000, 0, save_every=1, stop=f"[0,{saved + 1}]"))
        assert seen_by(tmp_path)["records"][0]["message"] == f"resumed after {saved} steps"


@pytest.mark.long
def test_a_stalled_process_ends_the_job_within_the_stated_time(tmp_path, start_toy):
    stall = 5
    process = start_toy(2, 100000, 0, save_every=1, stall=stall)
    wait_until(process, lambda: newest_steps(tmp_path) >= 3)
    os.kill(children(process)[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    finished(process, 1)
    # torchrun gives a process that it ends 30 s before it kills it.
    assert stall - 1 < time.monotonic() - began < stall + 60
    saved = newest_steps(tmp_path)
    assert saved >= 3
    finished(start_toy(1, 100000, 0, save_every=1, stop=f"[0,{saved + 1}]"))


def test_batches_too_small_for_the_processes_are_refused():
    engine = ParallelEngine.__new__(ParallelEngine)
    engine.count, engine.rank = 3, 1
    assert engine.rows(StageSettings(batch=8, accumulate=2)) == [1, 5]
    for wrong in (StageSettings(batch=2), StageSettings(batch=10, accumulate=4)):
        with pytest.raises(DistillationError, match=r"image for each of 3 processes.*fewer"):
            engine.rows(wrong)
