"""Files that are written whole or not at all, and folders that one process at a time writes to."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = ".lock"


class WriteError(OSError):
    """A file cannot be written; the message says what to do, and nothing was changed."""


def write_whole(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write a temporary file in the same folder, fsync, rename: readers see all or nothing.

    Raises FileExistsError where the file exists and `overwrite` is False, and WriteError; the file
    before it stays, and nothing else is left behind.
    """
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _rename_to_new(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise cannot_write(path, error, len(data)) from error
    finally:
        # A folder that cannot be written to has none.
        with suppress(OSError):
            temporary.unlink()


def cannot_write(path: Path, error: OSError, size: int = 0) -> WriteError:
    """The error for what the system says when `size` bytes go to `path`."""
    needed = f"{max(size, 10_000) / 1e6:.2f} MB of room and " if size else ""
    found = WriteError(
        f"Cannot write {path.name}: expected {needed}a folder that may be written to, got "
        f"{error.strerror or type(error).__name__} in {path.parent}. Nothing there was changed: "
        "make room or allow writing, then run this again."
    )
    found.errno = error.errno
    return found


def remove_unfinished(folder: Path, stem: str) -> None:
    """Remove what killed processes left of files whose names begin with `stem`.

    Only while the folder is held, see `held`: a process that is not killed writes there too.
    """
    for part in folder.glob(f".{stem}*.part"):
        part.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, name: str = _LOCK, *, wait: bool = True) -> Iterator[bool]:
    """Hold `folder` for this process, making it if need be → whether nobody else does.

    Without `wait` the block runs all the same where another one holds it. What a killed process
    held is free. Raises WriteError where the folder or its lock cannot be written to.
    """
    from filelock import FileLock, Timeout

    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            # Opening it to lock it may empty what it points to.
            raise OSError(0, f"a link in place of the lock {name}")
        lock = FileLock(path)
        lock.acquire(timeout=-1 if wait else 0, poll_interval=0.01)
    except Timeout:
        yield False
        return
    except NotImplementedError:
        # A file system without locks.
        yield True
        return
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield True
    finally:
        lock.release()


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Rename unless the name was taken meanwhile; a plain rename would overwrite on POSIX."""
    if os.name == "nt":
        os.rename(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # File systems without hard links: the remaining race is a few microseconds long.
        if path.exists():
            raise FileExistsError(f"{path} exists already: choose another name.") from None
        os.rename(temporary, path)
