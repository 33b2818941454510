"""Attention, its replacements and the ΔConvBlock against each other: layers and whole models."""

# What `layers.run` can measure.
SETS = ("rows", "sweep", "models", "training", "small")


class BenchmarkError(Exception):
    """What keeps a benchmark from giving figures, as a sentence."""
