"""`python dev.py test [--all] [pytest arguments]`: the gate, on the newest and the oldest ComfyUI.

Two pytest processes side by side on half of the cores each, because a process can have one ComfyUI
only: one on the newest (or the one at COMFYUI_PATH), one on the oldest. What touches ComfyUI runs
in both, the rest in whichever is free. The second one's output follows the first one's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from . import ROOT, test_queue
from .comfyui.tree import OLDEST, chosen_tree, version_of
from .lean import lean_python
from .pip import elapsed
from .test_queue import END, FOLDER

NO_TESTS = 5  # pytest's exit code when nothing was selected
SLOWEST = 15


@dataclass
class Run:
    """What one pytest process came to, as its own JUnit report counts it."""

    code: int
    total: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: list[tuple[float, str]] = field(default_factory=list)  # of each test, with its name

    @classmethod
    def read(cls, code: int, report: Path) -> "Run":
        if not report.is_file():
            return cls(code)
        suite = ElementTree.parse(report).getroot().find("testsuite")
        count = suite.attrib
        failed = int(count["failures"]) + int(count["errors"])
        seconds = [
            (float(case.get("time")), f"{case.get('classname')}::{case.get('name')}")
            for case in suite.iter("testcase")
        ]
        return cls(code, int(count["tests"]), failed, int(count["skipped"]), seconds)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py test", description=__doc__, allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help="the long tier too")
    options, chosen = parser.parse_known_args(argv)
    start = time.monotonic()
    lean_python()
    prepared = float(os.environ.get("DELTACONV_SETUP_SECONDS", 0)) + time.monotonic() - start
    start = time.monotonic()
    trees = [chosen_tree(), OLDEST.tree]
    with ExitStack() as stack:
        queue = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        held = stack.enter_context(tempfile.TemporaryFile())
        arguments = ["-m", "" if options.all else "not long", *chosen]
        newest = stack.enter_context(_pytest(trees[0], queue, "front", arguments))
        oldest = stack.enter_context(_pytest(trees[1], queue, "back", arguments, held))
        runs = [newest()]
        runs.append(oldest())
        held.seek(0)
        sys.stdout.write(held.read().decode(errors="replace"))
    print(summary(dict(zip(map(version_of, trees), runs, strict=True))))
    print(f"set-up took {prepared:.0f} s, the tests {elapsed(start)}")
    passed = sum(run.total - run.failed - run.skipped for run in runs)
    failed, skipped = sum(run.failed for run in runs), sum(run.skipped for run in runs)
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return exit_code(runs, narrowed=bool(chosen))


def summary(runs: dict[str, Run]) -> str:
    """The slowest tests of all runs, by the version of ComfyUI that each ran on, and files."""
    tests = [(*test, version) for version, run in runs.items() for test in run.seconds]
    slowest = sorted(tests, reverse=True)[:SLOWEST]
    lines = [f"{seconds:7.1f} s  {version:8} {name}" for seconds, name, version in slowest]
    files: Counter[str] = Counter()
    for seconds, name, _ in tests:
        files[name.partition("::")[0]] += seconds
    totals = [f"{seconds:7.1f} s  {name}" for name, seconds in files.most_common(SLOWEST)]
    return "\n".join(
        [f"\nThe {len(slowest)} slowest tests:", *lines, "\nThe slowest files:", *totals, ""]
    )


def exit_code(runs: list[Run], narrowed: bool) -> int:
    """Zero if no run failed and each executed something; of a narrowed selection, if any did."""
    failed = [run.code for run in runs if run.code not in (0, NO_TESTS)]
    # A run without one executed test is a failure even where pytest calls it a success.
    executed = [run.total > run.skipped for run in runs]
    enough = any(executed) if narrowed else all(executed)
    return failed[0] if failed else 0 if enough else NO_TESTS


@contextmanager
def _pytest(
    tree: Path, queue: Path, end: str, arguments: list[str], output: IO[bytes] | None = None
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
    environment |= {FOLDER: str(queue), END: end}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        line = [sys.executable, "-I", "-m", "pytest", f"--junit-xml={report}"]
        # The share of each process is not known before it ends, so percentages would mislead.
        line += ["-p", test_queue.__name__, "-o", "console_output_style=classic"]
        child = subprocess.Popen([*line, *arguments], cwd=ROOT, env=environment, stdout=output)
        try:
            yield lambda: Run.read(child.wait(), report)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
