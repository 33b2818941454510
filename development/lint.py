"""`python dev.py lint`: style and formatting, as the settings in pyproject.toml ask for."""

import argparse
import subprocess
import sys

from . import ROOT


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py lint", description=__doc__)
    parser.add_argument("--fix", action="store_true", help="mend what can be mended")
    fix = parser.parse_args(argv).fix
    checks = (["check", *(["--fix"] if fix else [])], ["format", *([] if fix else ["--check"])])
    ruff = [sys.executable, "-I", "-m", "ruff"]
    codes = [subprocess.run([*ruff, *check, "."], cwd=ROOT).returncode for check in checks]
    return max(codes)
