"""The ΔConv core: block, weights, families, costs. It knows torch and nothing of the host."""

from .block import DeltaConvBlock

__all__ = ["DeltaConvBlock"]
