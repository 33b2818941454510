"""An environment as a user's ComfyUI has it: what ComfyUI and this pack require, and no more.

`.venv` also holds what the tests and the optional features bring, so a missing requirement would
not be noticed there. Here the same files are linked into an environment beside it, in seconds.
"""

import contextlib
import json
import os
import shutil
import sysconfig
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from . import ROOT, DevelopmentError
from .comfyui.tree import TORCH_PACKAGES, chosen_tree, requirements
from .environment import VENV, locked, python_of
from .release import tomllib

LEAN = VENV / "lean"


def required(tree: Path) -> dict[str, Distribution]:
    """Name → installed distribution of all that ComfyUI's `tree` and the pack require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return closure([*TORCH_PACKAGES, *requirements(tree), *project["dependencies"]])


def closure(lines: Iterable[str], *, skip_missing: bool = False) -> dict[str, Distribution]:
    """Name → installed distribution of what these requirements bring, directly or by another."""
    found, seen = {}, set()
    open_ = [(Requirement(line), "") for line in lines]
    while open_:
        requirement, extra = open_.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                found[name] = distribution(name)
            except PackageNotFoundError as error:
                if skip_missing:
                    continue
                raise DevelopmentError(
                    f"Expected {requirement} in {VENV}, got no such package. If pyproject.toml "
                    "has changed, run `python dev.py lock`; then run this again."
                ) from error
            open_ += [(Requirement(line), wanted) for line in found[name].requires or []]
    return found


def lean_python() -> Path:
    """The Python of an environment with what ComfyUI and the pack require; made if need be.

    ComfyUI is the one that `.venv`, in which this process runs, was made for.
    """
    python = python_of(LEAN)
    distributions = required(chosen_tree())
    versions = {name: one.version for name, one in distributions.items()}
    stamp = LEAN / "made-from.json"
    with locked():
        with contextlib.suppress(OSError, ValueError):
            if json.loads(stamp.read_text(encoding="utf-8")) == versions:
                return python
        shutil.rmtree(LEAN, ignore_errors=True)
        venv.create(LEAN, with_pip=False, symlinks=os.name != "nt")
        scheme = "nt" if os.name == "nt" else "posix_prefix"
        target = Path(sysconfig.get_path("purelib", scheme, {"base": str(LEAN)}))
        for one in distributions.values():
            _link_files(one, target)
        stamp.write_text(json.dumps(versions), encoding="utf-8")
    return python


def _link_files(one: Distribution, target: Path) -> None:
    """Show the files of a distribution under `target`, without its programs."""
    for file in one.files:
        if ".." in file.parts:
            continue
        path = target / file
        path.parent.mkdir(parents=True, exist_ok=True)
        source = one.locate_file(file)
        try:
            os.link(source, path)
        except FileNotFoundError:
            # A compiled file that someone removed; Python makes it anew.
            continue
        except OSError:
            shutil.copy2(source, path)
