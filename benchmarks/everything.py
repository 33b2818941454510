"""All that is measured on a GPU, in order of value: a run that was cut goes on where it was."""

import time
from pathlib import Path

import torch

from . import convolutions, first_call, host, layers, models
from .report_file import ReportFile

# Rounds: a median of so few is told by its quartiles, which are recorded too.
REPEATS = 7


def run(
    folder: Path,
    tree: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    seconds: float | None = None,
) -> None:
    """Measures into one JSON file per part in `folder`; begins nothing after `seconds`.

    Whole steps of models need `tree`, a ComfyUI, and are left out without it.
    """
    end = None if seconds is None else time.monotonic() + seconds

    def file(name: str, results: str = "results") -> ReportFile:
        left = None if end is None else end - time.monotonic()
        return ReportFile(folder / f"{name}.json", results=results, resume=True, seconds=left)

    on_cpu = device.type == "cpu"
    if not on_cpu:
        convolutions.run(device, torch.float16, batch, REPEATS, file("convolutions"))
    host.run(device, torch.float16, batch, file("host"))
    if tree is not None:
        models.run(tree, device, batch, REPEATS, file("models", "steps"))
    each = ("small",) if on_cpu else ("rows", "models", "training", "sweep")
    for kind in each:
        layers.run(device, dtype, batch, REPEATS, (kind,), file("layers"))
    if device.type == "cuda":
        first_call.run(file("first_call"))
