"""Attention over the means of a map's cells: what a block's convolutions cannot carry across it."""

from types import ModuleType

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, scaled_dot_product_attention

# The map is pooled to at most so many rows and columns, whatever its size: 64 tokens.
SIDE = 8


def token_means(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, W, C] → means [B, rows, columns, C] of its cells, at most SIDE each way."""
    rows, columns = (min(size, SIDE) for size in x.shape[1:3])
    return adaptive_avg_pool2d(x.movedim(-1, 1), (rows, columns)).movedim(1, -1)


def spread(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """tokens [B, rows, columns, C] → [B, H, W, C], bilinear."""
    maps = tokens.movedim(-1, 1)
    return interpolate(maps, (height, width), mode="bilinear", align_corners=False).movedim(1, -1)


class HeadScale(nn.Module):
    """A factor [heads] of every head's scores; a module, since ComfyUI moves those."""

    def __init__(self, heads: int, value: float, *, dtype=None, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads,), value, dtype=dtype, device=device))


class PooledAttention(nn.Module):
    """x [B, H, W, C] → [B, H, W, C]: self-attention of at most 64 pooled tokens, spread out.

    y = spread(out(softmax(scale · q·kᵀ)·v)), with q, k, v = qkv(token_means(x)) and a learned scale
    per head. `heads` divide `dim`, C. Its cost does not grow with the map but for pooling and
    spreading. Our own, in no published file. `operations` supplies `Linear`, see DeltaConvBlock.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        operations: ModuleType | type = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.scale = HeadScale(heads, (dim // heads) ** -0.5, **factory)
        self.qkv = operations.Linear(dim, 3 * dim, bias=False, **factory)
        self.out = operations.Linear(dim, dim, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return spread(self.coarse(token_means(x)), *x.shape[1:3])

    def coarse(self, means: torch.Tensor) -> torch.Tensor:
        """`token_means` [B, rows, columns, C] → what is spread of them, of the same shape."""
        return self.out(self.attended(self.qkv(means)))

    def attended(self, projected: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of the tokens [B, rows, columns, 3C] → [B, rows, columns, C]."""
        batch, rows, columns, width = projected.shape
        scale = self.scale.weight.to(projected)
        heads = projected.view(batch, rows * columns, 3, len(scale), -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q * scale[:, None, None], k, v, scale=1.0)
        return seen.transpose(1, 2).reshape(batch, rows, columns, width // 3)
