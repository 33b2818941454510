"""Distillation: from a teacher's self-attention to ΔConvBlocks, on whatever host runs it."""

from .data import Dataset, Trajectory
from .presets import PRESETS, code_settings, default_settings, paper_settings
from .record import Record, weights_of
from .settings import DistillationError, DistillationSettings, StageSettings, default_kernels
from .teacher import Teacher, sample
from .trainer import distill

__all__ = [
    "PRESETS",
    "Dataset",
    "DistillationError",
    "DistillationSettings",
    "Record",
    "StageSettings",
    "Teacher",
    "Trajectory",
    "code_settings",
    "default_kernels",
    "default_settings",
    "distill",
    "paper_settings",
    "sample",
    "weights_of",
]
