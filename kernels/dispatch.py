"""One public function per op: it picks the implementation that fits the input."""

from collections.abc import Sequence

import torch

from .gated_pyramid import gated_pyramid_definition


def gated_pyramid(
    u: torch.Tensor, weights: Sequence[torch.Tensor], scales: Sequence[float], gate: str
) -> torch.Tensor:
    """u [B, H, W, h], one kernel [k, k, h] per scale → [B, H, W, len(scales) · h/2].

    Depthwise convolution and gate over all scales, with pooling and upsampling; see
    `gated_pyramid_definition`. The torch definition is the only implementation so far.
    """
    return gated_pyramid_definition(u, weights, scales, gate)
