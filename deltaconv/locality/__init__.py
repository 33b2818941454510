"""Locality of self-attention: statistics per layer, report, plots, recipes of kernel sizes."""
