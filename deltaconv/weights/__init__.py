"""ΔConv weights: the data, the file format, and compatibility with models."""

from .file import read_weights, write_weights
from .model import DeltaConvWeights, WeightsError

__all__ = ["DeltaConvWeights", "WeightsError", "read_weights", "write_weights"]
