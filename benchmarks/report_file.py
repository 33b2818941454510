"""A benchmark's JSON, written after every result: an interrupted run goes on with it."""

import json
import time
from pathlib import Path

from . import BenchmarkError


class ReportFile:
    """The report at `path`, or one in memory alone; `seconds` end the time to begin anything.

    With `resume` a report that is there is taken up, if it is of the same device and settings.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        results: str = "results",
        resume: bool = False,
        seconds: float | None = None,
    ):
        self._path, self._key, self._resume = path, results, resume
        self._end = None if seconds is None else time.monotonic() + seconds
        self.report: dict = {"environment": {}, results: []}

    def open(self, environment: dict) -> dict:
        """The report, empty or with earlier results. Raises BenchmarkError for another's."""
        self.report["environment"] = environment
        if self._resume and self._path and self._path.is_file():
            found = json.loads(self._path.read_text(encoding="utf-8"))
            for name, value in environment.items():
                if found["environment"].get(name) != value:
                    raise BenchmarkError(
                        f"Expected {self._path} to be of {name} {value}, as this run is, got "
                        f"{found['environment'].get(name)}. Name another file."
                    )
            self.report = found
        return self.report

    def wants(self, **about) -> bool:
        """Whether this is to be measured: it is not there yet, and there is time to begin it."""
        results = self.report[self._key]
        if any(all(each.get(k) == v for k, v in about.items()) for each in results):
            return False
        if self._end is not None and time.monotonic() > self._end:
            self.report["cut"] = True
            self._write()
            return False
        return True

    def add(self, result: dict) -> None:
        """Appends a result and writes the file."""
        self.report[self._key].append(result)
        self.report.pop("cut", None)
        self._write()

    def _write(self) -> None:
        if self._path:
            # Whole at any time: a run may be killed while it writes.
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
            part.replace(self._path)
