"""Download one file of a known entry: all of it, unchanged, a ΔConv file, or nothing.

The bytes go to `.NAME.HASH.part` in the same folder, which stays after an interruption and is gone
on from. It gets its final name when its size, its hash and its header are right.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..weights import WeightsError, read_weights
from .client import Broken, Offline, ask, pause, reading
from .entries import Entry
from .failures import DownloadError, cannot_write, megabytes, not_known, offline
from .placed import Found, Progress, file_digest, find_placed, no_progress

# In bytes: what has to stay free on the disk.
ROOM = 64 << 20
# How often a connection that breaks is opened again, and the seconds between.
_TRIES = 5
_PAUSE = 1.0


def download(entry: Entry, folder: Path, progress: Progress = no_progress) -> Found:
    """The entry's file in `folder`, downloaded unless it is there.

    What `progress` raises ends the download, and the next one goes on from there. Raises
    DownloadError that says what was expected, what was got and what to do.
    """
    try:
        if found := find_placed(entry, [folder], progress):
            return found
        if not entry.filled:
            raise not_known(entry, folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / f".{entry.file}.lock"
        with _alone(lock, progress):
            found = find_placed(entry, [folder], progress) or _download(entry, folder, progress)
            # Whoever waits for the lock finds the file, so nobody needs it any more.
            with suppress(OSError):
                lock.unlink()
            return found
    except Offline:
        raise offline(entry, folder) from None
    except OSError as error:
        raise cannot_write(error, folder) from error


def _download(entry: Entry, folder: Path, progress: Progress) -> Found:
    size, sha256 = _expected(entry, progress)
    part = folder / f".{entry.file}.{sha256[:16]}.part"
    _require_room(size - (part.stat().st_size if part.is_file() else 0), folder)
    got = _fetch(entry, part, size, progress)
    if got != sha256:
        part.unlink()
        raise DownloadError(
            f"Expected {entry.path} of {entry.repo} with the SHA-256 {sha256}, got {got}: the file "
            "was changed on its way or on the hub, and was not kept. Try again; if it stays so, do "
            "not use that file."
        )
    try:
        read_weights(part)
    except WeightsError as error:
        part.unlink()
        reason = str(error).replace(part.name, entry.file)
        raise DownloadError(
            f"{entry.path} of {entry.repo} came whole, but is no ΔConv file, and was not kept. "
            f"{reason}"
        ) from None
    path = folder / entry.file
    os.replace(part, path)
    for older in folder.glob(f".{entry.file}.*.part"):
        older.unlink()
    return Found(path, "downloaded", {"size": megabytes(size), "repo": entry.repo})


def _expected(entry: Entry, progress: Progress) -> tuple[int, str]:
    """(size in bytes, SHA-256) that the file must have, of the entry and of the hub."""
    remote = ask(entry, lambda: progress(0, 0))
    if remote.size is None:
        raise DownloadError(
            f"Expected the hub to say the size of {entry.path} of {entry.repo}, got none. Check "
            "the environment variable HF_ENDPOINT."
        )
    if entry.size is not None and entry.size != remote.size:
        raise DownloadError(
            f"Expected {entry.path} of {entry.repo} with {entry.size} bytes, got one with "
            f"{remote.size} on the hub. It is another file: update the entry only if you trust it."
        )
    sha256 = entry.sha256 or remote.sha256
    if sha256 is None:
        raise DownloadError(
            f"Expected a SHA-256 to hold {entry.path} of {entry.repo} against, got none, neither "
            "in its entry nor from the hub. Add sha256 to the entry in repositories.json."
        )
    if remote.sha256 not in (None, sha256):
        raise DownloadError(
            f"Expected {entry.path} of {entry.repo} with the SHA-256 {sha256}, got "
            f"{remote.sha256} on the hub. It is another file: update the entry only if you trust "
            "it."
        )
    return remote.size, sha256


def _require_room(wanted: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted + ROOM:
        raise DownloadError(
            f"Expected {megabytes(wanted + ROOM)} of free disk in {folder}, got {megabytes(free)}. "
            "Make room and run this again."
        )


class _Part:
    """A file that grows to `size` bytes, and the SHA-256 of what it holds."""

    def __init__(self, path: Path, file: BinaryIO, size: int, progress: Progress):
        self.file, self.size, self.progress = file, size, progress
        if file.tell() > size:
            file.truncate(0)
        self.digest = file_digest(path, progress)
        self.done = file.seek(0, os.SEEK_END)

    def tick(self) -> None:
        self.progress(self.done, self.size)

    def restart(self) -> None:
        self.file.truncate(0)
        self.digest, self.done = hashlib.sha256(), 0

    def add(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.digest.update(chunk)
        self.done += len(chunk)
        self.tick()


def _fetch(entry: Entry, path: Path, size: int, progress: Progress) -> str:
    """Bring the file at `path` to `size` bytes, from where it is → the SHA-256 of all of it."""
    with open(path, "ab") as file:
        part = _Part(path, file, size, progress)
        for attempt in range(_TRIES):
            if part.done == size:
                break
            if attempt:
                pause(_PAUSE, part.tick)
            with suppress(Broken):
                _read_on(entry, part)
        file.flush()
        os.fsync(file.fileno())
    if part.done < size:
        raise DownloadError(
            f"Expected {size} bytes of {entry.path} of {entry.repo}, got {part.done} before the "
            f"connection broke, {_TRIES} times. Check the network and run this again: it goes on "
            "from there."
        )
    return part.digest.hexdigest()


def _read_on(entry: Entry, part: _Part) -> None:
    """Add what follows to `part`, until the connection ends; raises Broken if it breaks."""
    with reading(entry, part.done, part.tick) as (start, chunks):
        if start != part.done:
            part.restart()
        for chunk in chunks:
            if part.done + len(chunk) > part.size:
                part.restart()
                raise DownloadError(
                    f"Expected {part.size} bytes of {entry.path} of {entry.repo}, got more. Try "
                    "again; if it stays so, do not use that file."
                )
            part.add(chunk)


@contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock file at `path`; what holds it elsewhere is waited for."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout:
            progress(0, 0)
    try:
        yield
    finally:
        lock.release()
