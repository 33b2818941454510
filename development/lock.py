"""`python dev.py lock [--upgrade]`: write the version of every package that set-up installs.

Read are development/requirements.in, pyproject.toml with its extras and the requirements of the
pinned ComfyUI. A version that still fits stays; `--upgrade` takes the newest of each. The result
holds for every system and every Python that the pack supports. Stdlib only: it works without the
environment, and needs a package index.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from . import ROOT, DevelopmentError
from .comfyui.tree import NEWEST, TORCH_PACKAGES, fetch_tree, requirement_name, requirements
from .pip import Pip

INPUT = ROOT / "development" / "requirements.in"
LOCK = ROOT / "development" / "requirements.lock"
HEADER = "# Written by `python dev.py lock`: all that set-up installs, on any system.\n"
OLDEST_PYTHON = "3.10"
_PIN = re.compile(r"[\w.-]+==[\w.!+]+( ; .+)?")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py lock", description=__doc__, allow_abbrev=False)
    parser.add_argument("--upgrade", action="store_true", help="take the newest of every package")
    upgrade = parser.parse_args(argv).upgrade
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        uv = _uv(folder)
        text = HEADER + _compile(uv, folder, upgrade)
    before = LOCK.read_text(encoding="utf-8").splitlines() if LOCK.is_file() else []
    partial = LOCK.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(LOCK)
    for sign, lines, others in (("-", before, text.splitlines()), ("+", text.splitlines(), before)):
        print(*(f"{sign} {line}" for line in lines if line not in others), sep="\n", end="")
    print(f"\nWrote {LOCK}; the next dev.py command installs what changed.")
    return 0


def pins(text: str) -> list[str]:
    """The lines of a lock, "name==version" each with an optional marker.

    Raises DevelopmentError at anything else: a range would float, an address or option would make
    the result depend on whose machine wrote it.
    """
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in lines:
        if not _PIN.fullmatch(line):
            raise DevelopmentError(
                f"Expected lines such as name==1.2.3 in {LOCK.name}, got {line!r}. "
                "Write it anew with `python dev.py lock`."
            )
    return lines


def _uv(folder: Path) -> Pip:
    """A new uv in an environment of its own; the pip there also fetches ComfyUI if need be."""
    line = [sys.executable, "-I", "-m", "venv", str(folder / "venv")]
    made = subprocess.run(line, capture_output=True, text=True, errors="replace")
    if made.returncode:
        raise DevelopmentError(f"Making a virtual environment failed: {made.stderr.strip()}")
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = Pip(scripts / "python", folder / "pip.log")
    pip.run("Installing uv", "install", "uv")
    fetch_tree(NEWEST, pip)
    return pip


def _compile(pip: Pip, folder: Path, upgrade: bool) -> str:
    theirs, overrides, output = (folder / name for name in ("comfyui.in", "torch.in", "lock.txt"))
    theirs.write_text("\n".join(requirements(NEWEST.tree)) + "\n", encoding="utf-8")
    # What we say of torch holds, whatever torchaudio asks for.
    ours = INPUT.read_text(encoding="utf-8").splitlines()
    ours = [line for line in ours if requirement_name(line) in TORCH_PACKAGES]
    overrides.write_text("\n".join(ours) + "\n", encoding="utf-8")
    if LOCK.is_file():
        output.write_text(LOCK.read_text(encoding="utf-8"), encoding="utf-8")
    line = [str(pip.python), "-I", "-m", "uv", "pip", "compile", "--quiet", "--universal"]
    line += ["--python-version", OLDEST_PYTHON, "--no-header", "--no-annotate", "--all-extras"]
    line += ["--override", str(overrides), "--output-file", str(output)]
    line += ["--upgrade"] if upgrade else []
    print("Choosing versions …", flush=True)
    done = subprocess.run(
        [*line, str(INPUT), str(theirs), str(ROOT / "pyproject.toml")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise DevelopmentError(
            f"No set of versions fits all requirements, or the package index could not be reached; "
            f"{LOCK.name} is as it was. uv said:\n{done.stderr.strip()}"
        )
    return "\n".join(sorted(pins(output.read_text(encoding="utf-8")))) + "\n"
