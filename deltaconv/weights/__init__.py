"""ΔConv weights: what they hold, how files name it, and which model they fit."""

from .file import read_weights, write_weights
from .model import DeltaConvWeights, WeightsError

__all__ = ["DeltaConvWeights", "WeightsError", "read_weights", "write_weights"]
