"""`python dev.py lint`: style, formatting, import contracts and types, as in pyproject.toml."""

import argparse
import subprocess
import sys
from pathlib import Path

from . import ROOT


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py lint", description=__doc__)
    parser.add_argument("--fix", action="store_true", help="mend what can be mended")
    fix = parser.parse_args(argv).fix
    programs = Path(sys.executable).parent
    python = ["--python-interpreter-path", sys.executable]
    checks = (
        [sys.executable, "-I", "-m", "ruff", "check", *(["--fix"] if fix else []), "."],
        [sys.executable, "-I", "-m", "ruff", "format", *([] if fix else ["--check"]), "."],
        [programs / "lint-imports", "--no-logo"],
        [programs / "pyrefly", "check", "--summary=none", "--output-format=min-text", *python],
    )
    return max([subprocess.run(check, cwd=ROOT).returncode for check in checks])
