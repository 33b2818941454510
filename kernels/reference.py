"""The heavy step of a ΔConvBlock in torch operators: the definition every kernel must meet."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

GATES = ("scaled", "sigmoid")

# Per scale its depthwise bias [h] or None; () if no scale has one.
Biases = Sequence[torch.Tensor | None]


class Projections(NamedTuple):
    """Weights of the linear layers after a pyramid of S scales: `out` and `pool`."""

    out_weight: torch.Tensor  # [C, S · h/2]
    out_bias: torch.Tensor  # [C]
    pool_weight: torch.Tensor  # [C, C]
    pool_bias: torch.Tensor  # [C]


def pooled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Size of a map at `scale`, rounded down as published; never below 1 × 1."""
    return max(1, int(height * scale)), max(1, int(width * scale))


def apply_gate(v: torch.Tensor, gate: str) -> torch.Tensor:
    """v [B, h, H, W] → [B, h/2, H, W]: one half of the channels gates the other.

    `scaled` is a · b · √(h/2), `sigmoid` is a · σ(b).
    """
    a, b = v.chunk(2, dim=1)
    if gate == "scaled":
        return a * (b * a.shape[1] ** 0.5)
    if gate == "sigmoid":
        return a * b.sigmoid()
    raise ValueError(f"Expected a gate out of {GATES}, got {gate=}.")


def gated_pyramid_definition(
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    biases: Biases = (),
) -> torch.Tensor:
    """u [B, H, W, h], one depthwise kernel [k, k, h] per scale → [B, H, W, len(scales) · h/2].

    Per scale: u is pooled, every channel convolved alone (zero padding), the scale's bias [h] added
    if it has one, one half of the channels gated with the other, the result upsampled bilinearly to
    H × W; the scales are concatenated. `biases` has an entry per scale, or none at all.
    Source: arXiv 2504.21292, the pyramid of gated convolutions.
    """
    height, width = u.shape[1:3]
    x = u.movedim(-1, 1)
    pyramid = []
    biases = biases or (None,) * len(scales)
    for weight, bias, scale in zip(weights, biases, scales, strict=True):
        v = x if scale == 1 else F.adaptive_avg_pool2d(x, pooled_size(height, width, scale))
        kernel = weight.permute(2, 0, 1).unsqueeze(1)
        v = F.conv2d(v, kernel, bias, padding=weight.shape[0] // 2, groups=u.shape[-1])
        v = apply_gate(v, gate)
        if scale != 1:
            v = F.interpolate(v, (height, width), mode="bilinear", align_corners=False)
        pyramid.append(v)
    return torch.cat(pyramid, dim=1).movedim(1, -1)


def pyramid_projection_definition(
    x: torch.Tensor,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    projections: Projections,
    biases: Biases = (),
) -> torch.Tensor:
    """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C].

    The gated pyramid of u through `out`, plus the mean of x over H, W through `pool`. `weights` are
    the pyramid's kernels [k, k, h], `biases` theirs [h].
    """
    out_weight, out_bias, pool_weight, pool_bias = projections
    pyramid = gated_pyramid_definition(u, weights, scales, gate, biases)
    context = F.linear(x.mean(dim=(1, 2), keepdim=True), pool_weight, pool_bias)
    return F.linear(pyramid, out_weight, out_bias) + context
