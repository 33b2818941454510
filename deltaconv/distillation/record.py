"""The record of each step, and the weights at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch

from ..weights.model import DeltaConvWeights, weights_of_blocks
from .settings import DistillationSettings
from .student import Student
from .teacher import Teacher


@dataclass(frozen=True)
class Record:
    """One step. `losses` are by site in init and layers, by loss name in joint.

    `memory` is the peak of bytes on the device, those of the process on a CPU, None where unknown;
    `message` tells what a guard did or how a run was resumed, mostly "".
    """

    stage: str
    step: int
    steps: int
    loss: float
    losses: Mapping[str, float]
    lr: float
    images_per_second: float
    memory: int | None
    seconds: float
    student: Student = field(repr=False)
    # With the steps that were planned.
    settings: DistillationSettings = field(repr=False)
    # Losses of all training steps so far, those before a resume included; it keeps growing.
    history: Sequence[float] = field(repr=False)
    message: str = ""
    saved: str = ""

    def to_mapping(self) -> dict[str, object]:
        """Plain data, one line of a log; non-finite numbers become None, for JSON."""
        return {
            k: _plain(v)
            for k, v in vars(self).items()
            if k not in ("student", "settings", "history") and v not in ("", None)
        }


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def weights_of(
    student: Student, teacher: Teacher, settings: DistillationSettings, **training: object
) -> DeltaConvWeights:
    """The student's averaged weights with the record of how they were made."""
    return weights_of_blocks(
        student.averaged_blocks(),
        family=teacher.family,
        base_model=teacher.base_model,
        training={"settings": settings.to_mapping(), **training},
        start=student.start,
    )


def memory_in_use(device: torch.device) -> int | None:
    """Bytes at the peak on the device, of the process now on a CPU; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().rss
