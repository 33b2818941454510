"""`python dev.py test [--all] [pytest arguments]`: the gate, on the newest and the oldest ComfyUI.

Two pytest processes, because a process can have one ComfyUI only: everything on the newest one (or
the one at COMFYUI_PATH), and the tests that touch ComfyUI again on the oldest one. They run side by
side on half of the cores each, and the second one's output follows the first one's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from . import ROOT
from .comfyui import OLDEST, chosen_tree, version_of

NO_TESTS = 5  # pytest's exit code when nothing was selected


@dataclass
class Run:
    """What one pytest process came to, as its own JUnit report counts it."""

    code: int
    total: int = 0
    failed: int = 0
    skipped: int = 0

    @classmethod
    def read(cls, code: int, report: Path) -> "Run":
        if not report.is_file():
            return cls(code)
        count = ElementTree.parse(report).getroot().find("testsuite").attrib
        failed = int(count["failures"]) + int(count["errors"])
        return cls(code, int(count["tests"]), failed, int(count["skipped"]))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py test", description=__doc__, allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help="the long tier too")
    options, chosen = parser.parse_known_args(argv)
    tier = "" if options.all else "not long"
    with ExitStack() as stack:
        newest = stack.enter_context(_pytest(chosen_tree(), tier, chosen))
        held = stack.enter_context(tempfile.TemporaryFile())
        markers = " and ".join(filter(None, ["comfyui", tier]))
        oldest = stack.enter_context(_pytest(OLDEST.tree, markers, chosen, held))
        runs = [newest()]
        runs.append(oldest())
        held.seek(0)
        sys.stdout.write(held.read().decode(errors="replace"))
    passed = sum(run.total - run.failed - run.skipped for run in runs)
    failed, skipped = sum(run.failed for run in runs), sum(run.skipped for run in runs)
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return exit_code(runs, narrowed=bool(chosen))


def exit_code(runs: list[Run], narrowed: bool) -> int:
    """Zero if every run passed and ran something; a narrowed selection may leave one run empty."""
    codes = [run.code for run in runs]
    if narrowed and set(codes) == {0, NO_TESTS}:
        return 0
    # A run without one executed test is a failure even where pytest calls it a success.
    idle = any(run.code == 0 and run.total == run.skipped for run in runs)
    return next(filter(None, codes), NO_TESTS if idle else 0)


@contextmanager
def _pytest(
    tree: Path, markers: str, chosen: list[str], output: IO[bytes] | None = None
) -> Iterator[Callable[[], Run]]:
    """A pytest process on that ComfyUI; yields what waits for it. None is left behind."""
    title = f"\nTests on ComfyUI {version_of(tree)}\n"
    if output:
        output.write(title.encode())
        output.flush()
    else:
        print(title, flush=True)
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    environment = {"OMP_NUM_THREADS": threads} | os.environ | {"DELTACONV_COMFYUI": str(tree)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        line = [sys.executable, "-I", "-m", "pytest", f"--junit-xml={report}", "-m", markers]
        child = subprocess.Popen([*line, *chosen], cwd=ROOT, env=environment, stdout=output)
        try:
            yield lambda: Run.read(child.wait(), report)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
