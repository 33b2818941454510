"""States where something goes wrong while they are saved or loaded: nothing lost, nothing half."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
import torch
import toy_teacher as toy
from comfyui_deltaconv.deltaconv.distillation import DistillationError, checkpoint, distill
from comfyui_deltaconv.deltaconv.distillation.checkpoint import (
    load_state,
    save_state,
    saved_steps,
    state_files,
)
from comfyui_deltaconv.deltaconv.whole_file import WriteError
from faults import POSIX, contents, full_disk, open_folder, read_only

IDENTITY = {"base": "toy-0", "recipe": {}}

# Saves so many states: at a line, where it was told how many, else in a copy of itself for each
# line, which tells the first number, until that is killed.
SAVING = """
import os, sys
from dataclasses import replace
from pathlib import Path
import torch
from comfyui_deltaconv.deltaconv.distillation.checkpoint import State, load_state, save_state
folder, source, numbers = Path(sys.argv[1]), Path(sys.argv[2]), list(map(int, sys.argv[3:]))
identity = {"base": "toy-0", "recipe": {}}
shapes = {"first.a": (200, 300)}
state = load_state(source, identity, shapes)

def save(first, step, count):
    for number in range(first, first + step * count, step):
        tensors = {**state.tensors, "history": torch.zeros(number, dtype=torch.float64)}
        progress = replace(state.progress, number=number)
        save_state(folder, State(tensors, progress), identity)

print("saving", flush=True)
if numbers:
    sys.stdin.readline()
    save(*numbers)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        save(int(line), 1, 10**6)
    print(child, flush=True)
    os.waitpid(child, 0)
"""
SHAPES = {"first.a": (200, 300)}


def state(number=1, value=0.0):
    """A state of one tensor, that the functions here take for whole."""
    weights = torch.full(SHAPES["first.a"], float(value))
    progress = checkpoint.Progress("layers", 1, 1, number, 1, 1, 0, 1.0, {})
    tensors = {
        "weights.first.a": weights,
        "ema.first.a": weights,
        "rng": torch.Generator().get_state(),
        "history": torch.zeros(number, dtype=torch.float64),
    }
    return checkpoint.State(tensors, progress)


def load(folder):
    return load_state(folder, IDENTITY, SHAPES)


def value(found):
    return float(found.tensors["weights.first.a"][0, 0])


@pytest.fixture
def saved(tmp_path):
    """A folder with states 1 and 2, of which every value is 2."""
    folder = tmp_path / "run"
    for number in (1, 2):
        save_state(folder, state(number, number), IDENTITY)
    return folder


def saving(*arguments):
    """A process that saves states, once it has begun."""
    line = [sys.executable, "-I", "-c", SAVING, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    assert child.stdout.readline() == "saving\n"
    return child


@POSIX
@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.long)])
def test_a_save_that_is_killed_leaves_a_state_to_go_on_from(saved, tmp_path, kills):
    source, moments, reached = tmp_path / "source", random.Random(0), 2
    shutil.copytree(saved, source)
    with saving(saved, source) as parent:
        for _ in range(kills):
            parent.stdin.write(f"{reached + 1}\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            while saved_steps(saved) == reached:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            found = load(saved).progress.number
            assert found > reached
            reached = found
            # Two states, those that were being removed, and the one that was being written.
            assert len(contents(saved)) <= 4
        parent.stdin.close()
    save_state(saved, state(reached + 1), IDENTITY)
    assert all(not name.endswith(".part") for name in contents(saved))


@POSIX
def test_a_full_disk_is_said_and_leaves_the_states_before(saved):
    before = contents(saved)
    with full_disk(room=100_000), pytest.raises(WriteError) as full:
        save_state(saved, state(3), IDENTITY)
    assert "state-00000003.safetensors: expected 0.49 MB of room" in str(full.value)
    assert "Nothing there was changed: make room" in str(full.value)
    assert contents(saved) == before
    assert load(saved).progress.number == 2


@POSIX
def test_a_folder_that_may_not_be_written_to_is_said():
    with open_folder() as folder:
        save_state(folder, state(1), IDENTITY)
        before = contents(folder)
        for path in folder.iterdir():
            path.chmod(0o444)
        with read_only(folder):
            with pytest.raises(WriteError, match=r"got Permission denied in .*allow writing"):
                save_state(folder, state(2), IDENTITY)
        assert contents(folder) == before


def test_a_state_that_is_replaced_while_it_is_read_is_one_or_the_other(saved, monkeypatch):
    """Its header comes from one file; then another stands in its place."""
    (newest, _), opened = state_files(saved), []
    other = saved.parent / "other"
    save_state(other, state(2, 7.0), IDENTITY)

    def replacing(path):
        if not opened:
            os.replace(other / newest.name, newest)
        opened.append(path)
        return open_tensors(path)

    open_tensors = checkpoint.open_tensors
    monkeypatch.setattr(checkpoint, "open_tensors", replacing)
    found = load(saved)
    assert len(opened) == 1 and value(found) == 7.0
    assert torch.equal(found.tensors["weights.first.a"], found.tensors["ema.first.a"])


def test_a_state_that_is_gone_is_one_before(saved, monkeypatch):
    newest, _ = state_files(saved)
    read = checkpoint._read

    def vanishing(path):
        newest.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(checkpoint, "_read", vanishing)
    assert load(saved).progress.number == 1


@POSIX
def test_links_are_replaced_and_what_they_point_to_stays(saved, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"somebody else's")
    link = saved / "state-00000003.safetensors"
    link.symlink_to(outside)
    save_state(saved, state(3), IDENTITY)
    assert outside.read_bytes() == b"somebody else's" and not link.is_symlink()
    for name in (".lock", ".running"):
        lock = saved / name
        lock.unlink(missing_ok=True)
        lock.symlink_to(outside)
        with pytest.raises(WriteError, match=rf"a link in place of the lock {name}"):
            begin(saved)
        lock.unlink()
    assert outside.read_bytes() == b"somebody else's"


def begin(folder):
    """The lock of a save, then that of a run."""
    save_state(folder, state(9), IDENTITY)
    with checkpoint.Checkpoints(folder, IDENTITY).alone():
        pass


def test_processes_that_save_into_one_folder_lose_nothing(saved, tmp_path):
    """Each removes what killed ones left, and must not take the other's unfinished file for it."""
    source = tmp_path / "source"
    shutil.copytree(saved, source)
    children = [saving(saved, source, first, 2, 40) for first in (3, 4)]
    # Both have begun, and save at once.
    for child in children:
        child.stdin.write("now\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=60)
    assert [child.returncode for child in children] == [0, 0]
    assert load(saved).progress.number == 82
    # The last to save keeps its own two, and a higher one, which it does not know.
    kept = contents(saved)
    assert len(kept) in (2, 3) and all(name.endswith(".safetensors") for name in kept)


def test_two_distillations_in_one_folder_are_refused(tmp_path):
    settings = toy.toy_settings(init="random")

    def run():
        return distill(toy.ToyTeacher(), toy.PLAN, toy.toy_data(), settings, folder=tmp_path)

    with closing(run()) as first:
        next(first)
        before = contents(tmp_path)
        with closing(run()) as second, pytest.raises(DistillationError) as refused:
            next(second)
        assert "no other distillation is writing to" in str(refused.value)
        assert str(tmp_path) in str(refused.value) and contents(tmp_path) == before
    # It is free again.
    with closing(run()) as third:
        assert "resumed" in next(third).message


def test_a_clock_that_was_set_back_changes_nothing(saved):
    """The newest state is the one with the highest number, whatever its time."""
    newest, older = state_files(saved)
    os.utime(newest, (1, 1))
    os.utime(older, (2**31, 2**31))
    assert load(saved).progress.number == 2
    save_state(saved, state(3), IDENTITY)
    assert [path.name[-13:-12] for path in state_files(saved)] == ["3", "2"]
