"""Attention, its replacements and the ΔConvBlock against each other: layers and whole models."""
