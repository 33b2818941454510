"""Distillation: from a teacher's self-attention to ΔConvBlocks, on whatever host runs it."""

from .data import Dataset, Trajectory
from .record import Record, weights_of
from .run import distil
from .settings import (
    DistilError,
    DistilSettings,
    StageSettings,
    default_kernels,
    default_settings,
    published_settings,
)
from .teacher import Teacher, sample

__all__ = [
    "Dataset",
    "DistilError",
    "DistilSettings",
    "Record",
    "StageSettings",
    "Teacher",
    "Trajectory",
    "default_kernels",
    "default_settings",
    "distil",
    "published_settings",
    "sample",
    "weights_of",
]
