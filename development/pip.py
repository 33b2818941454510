"""Runs the environment's pip as a step of the set-up; failures become sentences. Stdlib only."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import DevelopmentError

_NO_SPACE = ("No space left on device", "Errno 28", "not enough space on the disk")
_NO_NETWORK = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "NameResolutionError",
    "Max retries exceeded",
    "ProxyError",
    "SSLError",
    "Read timed out",
    "ReadTimeoutError",
    "Connection refused",
    "Connection reset",
    "Network is unreachable",
)
_NO_RELEASE = ("No matching distribution found", "requires a different Python")
_OTHER_HASH = ("DO NOT MATCH THE HASHES",)


class Pip:
    """The pip of `python`; all it says goes to `log`.

    The descriptors in `keep_open` stay open while pip runs, even if this process is killed.
    """

    def __init__(self, python: Path, log: Path, keep_open: Sequence[int] = ()):
        self.python, self.log, self.keep_open = python, log, tuple(keep_open)

    def run(self, purpose: str, *arguments: str) -> None:
        """Run one pip command; raises DevelopmentError with the reason and the log's tail."""
        line = [str(self.python), "-I", "-m", "pip", arguments[0], "--no-input"]
        line += ["--disable-pip-version-check", "--progress-bar", "off", *arguments[1:]]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8", errors="replace") as log:
            code = self._watch(purpose, line, log)
        if code:
            raise DevelopmentError(self._explain(purpose, code))

    def _watch(self, purpose: str, line: list[str], log) -> int:
        print(f"{purpose} …", end="", flush=True)
        start = time.monotonic()
        inherited = {"pass_fds": self.keep_open} if os.name == "posix" else {}
        child = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, **inherited)
        try:
            while True:
                try:
                    code = child.wait(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    if sys.stdout.isatty():
                        print(f"\r{purpose} … {elapsed(start)}", end="", flush=True)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
        again = f"\r{purpose} …" if sys.stdout.isatty() else ""
        print(f"{again} {elapsed(start) if code == 0 else 'failed'}", flush=True)
        return code

    def _explain(self, purpose: str, code: int) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if any(sign in text for sign in _NO_SPACE):
            reason = (
                "The disk is full. Free some space (pip's own cache: `pip cache purge`), or move "
                "this folder to a larger disk, then run the same command again."
            )
        elif any(sign in text for sign in _OTHER_HASH):
            reason = (
                "The package index offered an archive that is not the one this project was tested "
                "with. Nothing of it was used; check which index pip is set to."
            )
        elif any(sign in text for sign in _NO_NETWORK):
            reason = (
                "The package index could not be reached. Check the network (pip's own settings "
                "apply: PIP_INDEX_URL, HTTPS_PROXY), then run the same command again: it goes on "
                "where it stopped."
            )
        elif any(sign in text for sign in _NO_RELEASE):
            version = ".".join(map(str, sys.version_info[:2]))
            reason = (
                f"The package index has no release of it for this system and Python {version}, or "
                "could not be reached. If the network is fine, delete .venv and run dev.py with "
                "another Python (3.10 to 3.13 are the likeliest)."
            )
        else:
            reason = f"pip ended with exit code {code}. Mend what it names, then run this again."
        tail = "\n".join("    " + line for line in text.splitlines()[-12:])
        return f"{purpose} failed. {reason}\nThe end of {self.log}:\n{tail}"


def elapsed(start: float) -> str:
    """ "9 s" or "3 min 5 s" since `start` on the monotonic clock."""
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
