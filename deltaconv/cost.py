"""What a self-attention layer and its ΔConvBlock compute: floating-point operations, by formula.

A multiplication and an addition count as two operations; softmax, gates, pooling and upsampling
are left out on both sides, being linear in the map and small.
"""

from collections.abc import Sequence

from ..kernels import pooled_size
from .layout import BlockGeometry


def attention_flops(dim: int, height: int, width: int) -> int:
    """One self-attention layer on one map: four projections, Q·Kᵀ and the weighted sum of V."""
    tokens = height * width
    return 2 * (4 * tokens * dim**2 + 2 * tokens**2 * dim)


def block_flops(geometry: BlockGeometry, scales: Sequence[float], height: int, width: int) -> int:
    """One ΔConvBlock on one map: both projections, every scale's convolution, the pooled branch."""
    tokens, inner = height * width, geometry.dim // 2
    total = tokens * geometry.dim * inner + geometry.dim**2
    total += tokens * (inner // 2) * geometry.num_scales * geometry.dim
    for scale in scales:
        rows, columns = (height, width) if scale == 1 else pooled_size(height, width, scale)
        total += rows * columns * inner * geometry.kernel_size**2
    return 2 * total


def halved(size: int, times: int) -> int:
    """Rows or columns of a UNet's map after that many downsamplers, each rounding up."""
    for _ in range(times):
        size = (size + 1) // 2
    return size
