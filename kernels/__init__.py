"""The heavy operations, each one public function over a definition and its fast forms."""

from .dispatch import gated_pyramid
from .gated_pyramid import GATES, gated_pyramid_definition, pooled_size

__all__ = ["GATES", "gated_pyramid", "gated_pyramid_definition", "pooled_size"]
