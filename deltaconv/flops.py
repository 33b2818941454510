"""Floating-point operations of self-attention layers and of ΔConvBlocks, by formula.

A multiplication and an addition count as two operations; softmax, gates, pooling and upsampling
are left out on both sides, being linear in the map and small.
"""

from collections.abc import Sequence

from ..kernels import pooled_size
from .geometry import BlockGeometry
from .tokens import SIDE


def attention_flops(dim: int, height: int, width: int) -> int:
    """One self-attention layer on one map: four projections, Q·Kᵀ and the weighted sum of V."""
    tokens = height * width
    return 2 * (4 * tokens * dim**2 + 2 * tokens**2 * dim)


def linfusion_flops(dim: int, heads: int, hidden: int, tokens: int) -> int:
    """LinFusion's attention: four projections, two networks C → hidden → C, kᵀv and q·kᵀv."""
    projections, networks = 4 * dim**2, 2 * 2 * dim * hidden
    return 2 * tokens * (projections + networks + 2 * dim * (dim // heads))


def paper_attention_operations(dim: int, tokens: int) -> int:
    """One self-attention layer as arXiv 2504.21292 counts it: 4nC² + 4n²C + 4nC.

    Recomputed from its table. The projections are in multiply-adds and the two products in single
    operations: compare it with that table only.
    """
    return 4 * tokens * dim**2 + 4 * tokens**2 * dim + 4 * tokens * dim


# The paper's table for the block at its largest size; we know no formula that gives it.
PAPER_BLOCK_OPERATIONS = 1_589.10e9


def block_flops(geometry: BlockGeometry, scales: Sequence[float], height: int, width: int) -> int:
    """One ΔConvBlock on one map: both projections, every scale's convolution, the pooled branch,
    the attention over pooled tokens if it has one."""
    tokens, inner = height * width, geometry.dim // 2
    total = tokens * geometry.dim * inner + geometry.dim**2
    total += tokens * (inner // 2) * geometry.num_scales * geometry.dim
    for scale in scales:
        rows, columns = (height, width) if scale == 1 else pooled_size(height, width, scale)
        total += rows * columns * inner * geometry.kernel_size**2
    if geometry.heads:
        pooled = min(height, SIDE) * min(width, SIDE)
        total += 4 * pooled * geometry.dim**2 + 2 * pooled**2 * geometry.dim
    return 2 * total


def halved(size: int, times: int) -> int:
    """Rows or columns of a UNet's map after `times` downsamplers, each rounding up."""
    for _ in range(times):
        size = (size + 1) // 2
    return size
