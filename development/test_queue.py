"""A pytest plugin: the gate's two processes, one on each ComfyUI, share what touches no ComfyUI.

Each runs its own tests first, those that touch ComfyUI. The rest is for whoever is free: one takes
it from the front, the other from the back, test by test, so both end at the same time.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

# Set by dev.py test: a folder that both processes see, and which end of the list this one takes.
FOLDER, END = "DELTACONV_TEST_QUEUE", "DELTACONV_TEST_QUEUE_END"


def in_turn(items: Iterable[pytest.Item], folder: Path, from_back: bool) -> Iterator[pytest.Item]:
    """Our own tests, then those of the shared ones that the other process has not taken."""
    own = [item for item in items if item.get_closest_marker("comfyui")]
    shared = [item for item in items if not item.get_closest_marker("comfyui")]
    yield from own
    for item in reversed(shared) if from_back else shared:
        try:
            (folder / hashlib.sha256(item.nodeid.encode()).hexdigest()).mkdir()
        except FileExistsError:
            continue
        yield item


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Pytest's own loop, over tests that are taken one by one."""
    if FOLDER not in os.environ or session.config.option.collectonly:
        return None
    if session.testsfailed and not session.config.option.continue_on_collection_errors:
        raise session.Interrupted(f"{session.testsfailed} errors during collection")
    items = in_turn(session.items, Path(os.environ[FOLDER]), os.environ[END] == "back")
    item = next(items, None)
    while item is not None:
        # Pytest keeps the fixtures that the next test shares with this one.
        following = next(items, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True
