"""How these tests start processes: as torchrun does, on this machine's CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_parallel


@pytest.fixture(autouse=True)
def rounding(one_thread):
    """See `one_thread`."""


def torchrun(count: int, *arguments, **options) -> subprocess.Popen:
    """`count` processes of a script or module with its arguments, started by torchrun."""
    # Its default port is one for all: side by side, each needs its own.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    line = [sys.executable, *launch, *map(str, arguments)]
    return subprocess.Popen(line, env=environment, **pipes, **options)


@pytest.fixture
def start_toy(tmp_path):
    """(count, layers, joint, **entries) → the processes of `toy_parallel`, ended with the test."""
    started = []

    def start(count, layers, joint, folder: Path = tmp_path, **entries):
        folder.mkdir(parents=True, exist_ok=True)
        values = [f"{name}={value}" for name, value in entries.items()]
        script = [toy_parallel.__file__, folder, layers, joint, *values]
        started.append(torchrun(count, *script))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)
