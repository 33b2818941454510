"""Whatever reads what strangers made takes an input or refuses it: nothing else, and in time.

The child process may write into its folder alone, and start, unpickle and ask nothing; it fails at
the first input that takes a second, and where memory grows beyond the pages of Python and torch.
"""

import json
import os
import subprocess
import sys

import fuzzing
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FILES = ("weights", "recipe", "states", "downloads", "report")


@pytest.mark.any_comfyui
@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ((*FILES, "inputs"), 150),
        *(pytest.param((name,), 10**6, marks=pytest.mark.long) for name in (*FILES, "inputs")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_every_input_is_taken_or_refused(comfyui_tree, tmp_path, targets, count):
    line = [sys.executable, "-I", fuzzing.__file__, tmp_path, *targets, "--inputs", count]
    if "inputs" in targets:
        line += ["--comfyui", comfyui_tree]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for told in filter(lambda text: text.startswith("{"), done.stdout.splitlines()):
        print(told)
        found |= json.loads(told)
    assert found.keys() == set(targets)
    assert all(count > one["taken"] > count / 100 for one in found.values())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
ONCE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ONCE
@given(value=values, text=st.text(max_size=60))
@pytest.mark.parametrize("name", FILES)
def test_what_hypothesis_finds_is_taken_or_refused(tmp_path, name, value, text):
    target = fuzzing.TARGETS[name](tmp_path)
    plain = json.dumps(value).encode()
    header = {"a.b": {"dtype": "F32", "shape": value, "data_offsets": value}, "__metadata__": value}
    for data in (text.encode(), plain, fuzzing.framed(value, b""), fuzzing.framed(header, plain)):
        target.read(data)


@pytest.mark.parametrize(
    "does",
    [
        "open('../outside', 'w')",
        "os.mkdir('../outside')",
        "os.rename('x', '../outside')",
        "os.system('true')",
        "subprocess.run(['true'])",
        "pickle.loads(pickle.dumps(os.getcwd))",
        "socket.create_connection(('127.0.0.1', 9))",
    ],
)
def test_the_guards_of_the_child_hold(tmp_path, does):
    code = f"""
import os, pickle, socket, subprocess, sys
from pathlib import Path
sys.path.append({os.path.dirname(fuzzing.__file__)!r})
import fuzzing
fuzzing.confine(Path.cwd())
Path("inside").write_text("may be")
try:
    {does}
except fuzzing.Forbidden:
    print("forbidden")
"""
    folder = tmp_path / "folder"
    folder.mkdir()
    line = [sys.executable, "-I", "-c", code]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.stdout == "forbidden\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
