"""The gate: how its two processes share the tests, and what it makes of their ends."""

import os
import re
import subprocess
import sys

import pytest
from comfyui_deltaconv.development import test_queue
from comfyui_deltaconv.development.test import NO_TESTS, Run, exit_code, summary

TESTS = """
import os, time
from pathlib import Path
import pytest

@pytest.mark.comfyui
def test_own():
    Path(str(os.getpid())).touch()
    # The next test is taken by now: once both are here, each has a part.
    deadline = time.monotonic() + 60
    while len([path for path in Path().iterdir() if path.name.isdigit()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)

@pytest.fixture(scope="module")
def made():
    yield
    Path("taken_down").mkdir(exist_ok=True)

@pytest.mark.parametrize("number", range(30))
def test_shared(number, made):
    time.sleep(0.02)

def test_that_fails():
    raise ValueError("on purpose")
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Two pytest processes on the same tests → their runs."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "test_it.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = comfyui\n")
    (folder / "queue").mkdir()
    children = []
    for end in ("front", "back"):
        line = [sys.executable, "-I", "-m", "pytest", "-p", test_queue.__name__]
        line += ["-p", "no:cacheprovider", f"--junit-xml={end}.xml", "-o", "addopts="]
        where = {test_queue.FOLDER: str(folder / "queue"), test_queue.END: end}
        pipes = {"stdout": subprocess.DEVNULL, "cwd": folder}
        children.append(subprocess.Popen(line, env=os.environ | where, **pipes))
    codes = [child.wait(timeout=60) for child in children]
    assert (folder / "taken_down").is_dir()
    return [
        Run.read(code, folder / f"{end}.xml")
        for code, end in zip(codes, ("front", "back"), strict=True)
    ]


def test_each_shared_test_runs_once_and_own_ones_twice(shared):
    names = [name.split("::")[1] for run in shared for _, name in run.seconds]
    expected = ["test_own", "test_own", "test_that_fails"]
    assert sorted(names) == sorted(expected + [f"test_shared[{n}]" for n in range(30)])
    assert all(run.total >= 2 for run in shared)


def test_a_failure_in_one_process_fails_the_gate(shared):
    assert sum(run.failed for run in shared) == 1
    assert exit_code(shared, narrowed=False) == 1


def test_the_slowest_tests_of_both_are_named():
    runs = {"0.30.0": Run(0, seconds=[(1.0, "a::b"), (30.0, "c::d")])}
    runs["0.18.0"] = Run(0, seconds=[(n / 10, f"e::{n}") for n in range(20)] + [(12.0, "f::g")])
    said = summary(runs).strip().splitlines()
    assert said[0] == "The 15 slowest tests:"
    assert re.split(" {2,}", said[1].strip()) == ["30.0 s", "0.30.0", "c::d"]
    assert re.split(" {2,}", said[2].strip()) == ["12.0 s", "0.18.0", "f::g"]
    files = said[said.index("The slowest files:") + 1 :]
    assert said.index("The slowest files:") == 17
    found = [re.split(" {2,}", line.strip()) for line in files]
    assert found == [["30.0 s", "c"], ["19.0 s", "e"], ["12.0 s", "f"], ["1.0 s", "a"]]


@pytest.mark.parametrize(
    ("runs", "narrowed", "code"),
    [
        ([Run(0, 9), Run(0, 4, 0, 1)], False, 0),
        ([Run(0, 9), Run(1, 4, 1)], False, 1),
        ([Run(0, 9), Run(NO_TESTS)], False, NO_TESTS),
        ([Run(0, 9), Run(0)], False, NO_TESTS),
        ([Run(0, 9), Run(NO_TESTS)], True, 0),
        ([Run(0), Run(0, 1)], True, 0),
        ([Run(0), Run(0, 1, 0, 1)], True, NO_TESTS),
        ([Run(NO_TESTS), Run(NO_TESTS)], True, NO_TESTS),
        ([Run(0, 9), Run(0, 3, 0, 3)], False, NO_TESTS),
        ([Run(2), Run(0, 9)], False, 2),
    ],
)
def test_gate_fails_unless_both_runs_ran_and_passed(runs, narrowed, code):
    assert exit_code(runs, narrowed) == code
