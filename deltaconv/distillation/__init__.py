"""Distillation of a teacher's self-attention into ΔConvBlocks, independent of the host."""

from .data import Dataset, Trajectory
from .presets import PRESETS, code_settings, default_settings, paper_settings
from .record import Record, weights_of
from .settings import DistillationError, DistillationSettings, StageSettings, default_kernels
from .teacher import Teacher, in_place_of_attention, sample
from .token_plans import plans_with_tokens
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
    "in_place_of_attention",
    "paper_settings",
    "plans_with_tokens",
    "sample",
    "weights_of",
]
