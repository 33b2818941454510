"""Keeps `.venv` at the root as the pack needs it, resumable and quick to check. Stdlib only."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import ROOT, DevelopmentError
from .comfyui.tree import (
    NEWEST,
    Release,
    cache_folder,
    chosen_tree,
    fetch_front_end,
    fetch_tree,
    front_end_folder,
    front_end_pin,
    requirement_name,
    requirements,
)
from .lock import LOCK, pins
from .pip import Pip

VENV = ROOT / ".venv"
STAMP = VENV / "deltaconv-setup.json"
# torchaudio is not among them: it asks for an older torch than it works with.
HELD = {"torch", "torchvision"}


def ensure(releases: Sequence[Release] = ()) -> Path:
    """The Python of a complete `.venv`, with the chosen ComfyUI and `releases` in the cache.

    Does only what is missing. Raises DevelopmentError, with what to do about it.
    """
    python = python_of(VENV)
    if is_complete(python, releases):
        return python
    with locked() as lock:
        # Whoever held the lock before may have done it all.
        if is_complete(python, releases):
            return python
        try:
            _set_up(python, releases, lock)
        except OSError as error:
            raise DevelopmentError(
                f"Set-up failed: {error}. Check free space and permissions of {ROOT} and "
                f"{cache_folder()} (DELTACONV_CACHE names another), then run this again."
            ) from error
    return python


def python_of(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def is_complete(python: Path, releases: Sequence[Release]) -> bool:
    """Whether nothing is left to do: the stamp fits, the trees and front ends are there."""
    tree = chosen_tree()
    trees = [tree, *(release.tree for release in releases)]
    if not all((tree / "main.py").is_file() for tree in trees):
        return False
    if not all(front_end_folder(pin).is_dir() for pin in _other_front_ends(tree, releases)):
        return False
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    version = _python_version(python)
    return version is not None and stamp == {"inputs": _inputs(version, tree)}


def _set_up(python: Path, releases: Sequence[Release], lock: int) -> None:
    print(f"Setting up {VENV} (the first time takes minutes; a second run finds it done).")
    version = _usable_venv(python)
    pip = Pip(python, _state_file("log"), keep_open=[lock])

    tree = chosen_tree()
    if tree == NEWEST.tree:
        fetch_tree(NEWEST, pip)
    for release in releases:
        fetch_tree(release, pip)
    for pin in _other_front_ends(tree, releases):
        fetch_front_end(pin, pip)

    inputs = _inputs(version, tree)
    STAMP.unlink(missing_ok=True)
    # Exactly the lock: nothing is resolved, so nothing can come that was released since.
    exactly = ("install", "--no-deps")
    pip.run("Installing torch and all other packages (large)", *exactly, "-r", str(LOCK))
    if tree != NEWEST.tree:
        # Your ComfyUI may want other versions: pip leaves what suits it as the lock has it, changes
        # what does not, and adds the newest of what the lock lacks. torch stays.
        wanted = VENV / "comfyui-requirements.txt"
        wanted.write_text("\n".join(requirements(tree)) + "\n", encoding="utf-8")
        torch = [line for line in pins(_lock_text()) if requirement_name(line) in HELD]
        pip.run("Installing what your ComfyUI needs besides", "install", "-r", str(wanted), *torch)
    # Built by the lock's setuptools; without isolation pip downloads none.
    pip.run("Installing the pack", *exactly, "--no-build-isolation", "--editable", str(ROOT))
    # Last and in one piece: without it the next run repeats the steps, which find their work done.
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps({"inputs": inputs}), encoding="utf-8")
    partial.replace(STAMP)


def _usable_venv(python: Path) -> str:
    """Make `.venv` if it is missing or cannot be used → what its Python says of itself."""
    # Outside the folder, since venv clears it first: there from before the making until after it.
    making = _state_file("making")
    version = _python_version(python)
    if version and not making.exists() and _runs(python, "import pip._internal.cli.main"):
        return version
    if VENV.exists():
        ours = (VENV / "pyvenv.cfg").is_file() or making.exists()
        if not ours and any(VENV.iterdir()):
            raise DevelopmentError(
                f"{VENV} is not a virtual environment, and this script would put its own there. "
                "Move it away, then run this again."
            )
        print("The virtual environment is incomplete; making it anew.")
    making.touch()
    line = [sys.executable, "-I", "-m", "venv", "--clear", str(VENV)]
    made = subprocess.run(line, capture_output=True, text=True, errors="replace")
    version = _python_version(python)
    if made.returncode or version is None:
        said = (made.stdout + made.stderr).strip()
        raise DevelopmentError(
            f"Making a virtual environment with {sys.executable} failed. If its module venv or "
            "ensurepip is missing, install it (Debian and Ubuntu: `apt install python3-venv`), "
            f"then run this again. It said:\n{said}"
        )
    making.unlink()
    return version


def _python_version(python: Path) -> str | None:
    """What that Python says of itself, or None if it does not run."""
    code = "import sys; print(sys.version, sys.platform)"
    try:
        said = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() if said.returncode == 0 else None


def _runs(python: Path, code: str) -> bool:
    return subprocess.run([python, "-I", "-c", code], capture_output=True).returncode == 0


def _state_file(suffix: str) -> Path:
    """A file in the cache that belongs to this repository folder."""
    name = hashlib.sha256(str(ROOT).encode()).hexdigest()[:16]
    path = cache_folder() / f"setup-{name}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _inputs(version: str, tree: Path) -> str:
    """A hash of everything the environment is made from."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    parts = [version, str(ROOT), pyproject, _lock_text()]
    if tree != NEWEST.tree:
        parts += requirements(tree)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _lock_text() -> str:
    try:
        return LOCK.read_text(encoding="utf-8")
    except OSError as error:
        raise DevelopmentError(
            f"Expected the list of versions in {LOCK} ({error.strerror}). Restore it from the "
            "repository, or write it anew with `python dev.py lock`."
        ) from error


def _other_front_ends(tree: Path, releases: Sequence[Release]) -> list[str]:
    """Front-end versions that the releases pin and the chosen tree's requirements do not bring."""
    present = [release for release in releases if (release.tree / "main.py").is_file()]
    brought = front_end_pin(tree) if (tree / "main.py").is_file() else None
    pins = {front_end_pin(release.tree) for release in present}
    return sorted(pin for pin in pins - {brought} if pin)


@contextlib.contextmanager
def locked() -> Iterator[int]:
    """Hold this repository's set-up lock; the system lets go of it however this process ends."""
    with _state_file("lock").open("w") as file:
        waiting = False
        while not _try_lock(file.fileno()):
            if not waiting:
                print("Another set-up of this folder is running; waiting for it …", flush=True)
                waiting = True
            time.sleep(0.5)
        yield file.fileno()


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
