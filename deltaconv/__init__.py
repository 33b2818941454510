"""The ΔConv core: block, weights, families, costs. It imports torch and nothing of ComfyUI."""

from .block import DeltaConvBlock
from .weights.file import read_weights, write_weights
from .weights.model import DeltaConvWeights, WeightsError

__all__ = ["DeltaConvBlock", "DeltaConvWeights", "WeightsError", "read_weights", "write_weights"]
