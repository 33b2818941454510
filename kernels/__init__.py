"""The heavy operations: public functions, each with a definition and fast implementations."""

from .ops import gated_pyramid, pyramid_projection
from .reference import (
    GATES,
    Biases,
    Projections,
    gated_pyramid_definition,
    pooled_size,
    pyramid_projection_definition,
)
from .site import SiteProjection

__all__ = [
    "GATES",
    "Biases",
    "Projections",
    "SiteProjection",
    "gated_pyramid",
    "gated_pyramid_definition",
    "pooled_size",
    "pyramid_projection",
    "pyramid_projection_definition",
]
