"""What goes wrong on a disk: made for real, by limits and rights of the system."""

import os
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

POSIX = pytest.mark.skipif(os.name == "nt", reason="limits, signals and rights of POSIX")
# Whoever owns nothing, on most systems.
_NOBODY = 65534


@contextmanager
def full_disk(room: int):
    """Files cannot grow beyond `room` bytes, as on a disk that is full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal; then the write fails.
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def open_folder():
    """A folder that everybody may come to, and write into until it is made read-only."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def read_only(folder: Path):
    """The folder may not be written to, not even by root: the process acts as nobody meanwhile."""
    before = os.geteuid()
    folder.chmod(0o555)
    if before == 0:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)
        folder.chmod(0o777)


def contents(folder: Path) -> dict[str, bytes]:
    """Name → bytes of everything in the folder but its locks."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in (".lock", ".running")
    }
