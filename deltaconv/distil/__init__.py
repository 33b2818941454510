"""Distillation: from a teacher's self-attention to ΔConvBlocks, on whatever host runs it."""

from .data import Dataset, Trajectory
from .presets import PRESETS, code_settings, default_settings, paper_settings
from .record import Record, weights_of
from .run import distil
from .settings import (
    DistilError,
    DistilSettings,
    StageSettings,
    default_kernels,
)
from .teacher import Teacher, sample

__all__ = [
    "PRESETS",
    "Dataset",
    "DistilError",
    "DistilSettings",
    "Record",
    "StageSettings",
    "Teacher",
    "Trajectory",
    "code_settings",
    "default_kernels",
    "default_settings",
    "distil",
    "paper_settings",
    "sample",
    "weights_of",
]
