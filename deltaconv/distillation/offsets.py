"""Mean attention over relative offsets: where a site looks, as seen from the query."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Projections:
    """The linear maps of one attention module: query, key, value [E, C], E = heads · head size."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    heads: int


class OffsetMeans:
    """Attention weights summed by offset Δ = key − query, for chosen queries of a map H × W."""

    def __init__(self, heads: int, height: int, width: int):
        self.size = (height, width)
        shape = (heads, 2 * height - 1, 2 * width - 1)
        self.total = torch.zeros(shape, dtype=torch.float32)
        self.count = torch.zeros(shape[1:], dtype=torch.float32)

    def add(self, x: torch.Tensor, projections: Projections, queries: torch.Tensor) -> None:
        """x [H, W, C], queries [Q] as indices into H · W: count their attention in."""
        height, width = self.size
        tokens = x.flatten(0, 1).float()
        query, key = (
            (rows @ weight.to(rows).T).unflatten(-1, (projections.heads, -1)).transpose(0, 1)
            for rows, weight in (
                (tokens[queries.to(tokens.device)], projections.query),
                (tokens, projections.key),
            )
        )
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        for column, index in enumerate(queries.tolist()):
            row, col = divmod(index, width)
            window = (
                slice(height - 1 - row, 2 * height - 1 - row),
                slice(width - 1 - col, 2 * width - 1 - col),
            )
            self.total[(slice(None), *window)] += weights[:, column].unflatten(-1, self.size).cpu()
            self.count[window] += 1

    def kernels(self, kernel_size: int, scale: float) -> torch.Tensor:
        """[heads, k, k]: mean attention within the kernel's window at `scale`, each of sum 1.

        Offsets are averaged into the cells of the smaller map; those never seen count as nothing.
        """
        mean = self.total / self.count.clamp_min(1)
        stride = max(1, round(1 / scale))
        if stride > 1:
            # Centred on offset 0, so that the smaller map keeps its middle.
            mean = F.avg_pool2d(mean, 2 * (stride // 2) + 1, 1, stride // 2)
        centre = [length // 2 for length in mean.shape[1:]]
        reach = kernel_size // 2 * stride
        padded = F.pad(mean, (reach, reach, reach, reach))
        rows, cols = (slice(at, at + 2 * reach + 1, stride) for at in centre)
        window = padded[:, rows, cols]
        return window / window.sum((1, 2), keepdim=True).clamp_min(1e-12)
