"""How these tests start processes: as torchrun does, on this machine's CPU."""

from pathlib import Path

import pytest
import toy_parallel
from launched import launched


@pytest.fixture(autouse=True)
def rounding(one_thread):
    """See `one_thread`."""


@pytest.fixture
def start_toy(tmp_path):
    """(count, layers, joint, **entries) → the processes of `toy_parallel`, ended with the test."""
    started = []

    def start(count, layers, joint, folder: Path = tmp_path, **entries):
        folder.mkdir(parents=True, exist_ok=True)
        values = [f"{name}={value}" for name, value in entries.items()]
        script = [toy_parallel.__file__, folder, layers, joint, *values]
        started.append(launched(count, *script, cwd=folder))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)
