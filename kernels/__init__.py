"""The heavy operations, each one public function over a definition and its fast forms."""

from .ops import gated_pyramid, pyramid_projection
from .reference import (
    GATES,
    Biases,
    Projections,
    gated_pyramid_definition,
    pooled_size,
    pyramid_projection_definition,
)

__all__ = [
    "GATES",
    "Biases",
    "Projections",
    "gated_pyramid",
    "gated_pyramid_definition",
    "pooled_size",
    "pyramid_projection",
    "pyramid_projection_definition",
]
