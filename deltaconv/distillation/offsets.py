"""A teacher's mean attention by offset, as depthwise kernels."""

import torch
import torch.nn.functional as F

from ..locality.attention import add_by_offset, attention_of, pairs_by_offset


class OffsetMeans:
    """Attention of chosen queries of a map H × W, summed by offset Δ = key − query.

    `mass` [heads, 2H−1, 2W−1] is that sum, `pairs` [2H−1, 2W−1] the number of terms in it.
    """

    def __init__(self, heads: int, height: int, width: int):
        self.size = (height, width)
        self.mass = torch.zeros(heads, 2 * height - 1, 2 * width - 1)
        self.pairs = torch.zeros(2 * height - 1, 2 * width - 1)

    def add(
        self, q: torch.Tensor, k: torch.Tensor, queries: torch.Tensor, scale: float | None = None
    ) -> None:
        """q, k [heads, H · W, d] as they act, queries [Q] as indices: add their attention.

        `scale` defaults to 1/√d.
        """
        rows = attention_of(q, k, queries.tolist(), scale=scale)
        mass = rows.new_zeros(self.mass.shape)
        ones = rows.new_ones(rows.shape[:2])
        add_by_offset(mass, rows, ones, queries.tolist(), *self.size)
        self.mass += mass.cpu()
        self.pairs += pairs_by_offset(queries.tolist(), *self.size)

    def kernels(self, kernel_size: int, scale: float) -> torch.Tensor:
        """[heads, k, k]: mean attention within the kernel's window at `scale`, each of sum 1.

        Offsets are averaged into the cells of the smaller map; those without pairs count as 0.
        """
        mean = self.mass / self.pairs.clamp_min(1)
        stride = max(1, round(1 / scale))
        if stride > 1:
            # Centered on offset 0, so that the smaller map keeps its middle.
            mean = F.avg_pool2d(mean, 2 * (stride // 2) + 1, 1, stride // 2)
        center = [length // 2 for length in mean.shape[1:]]
        reach = kernel_size // 2 * stride
        padded = F.pad(mean, (reach, reach, reach, reach))
        rows, cols = (slice(at, at + 2 * reach + 1, stride) for at in center)
        window = padded[:, rows, cols]
        return window / window.sum((1, 2), keepdim=True).clamp_min(1e-12)
