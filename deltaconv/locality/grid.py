"""Attention maps of a grid of query points, pooled and packed into atlases for the web page."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image

# Query points per side, and the most cells per side of one of their maps.
POINTS = 16
CELLS = 32
# Weights over uniform of the darkest and the brightest color.
LOW, HIGH = 0.3, 30.0


@dataclass
class GridMaps:
    """Mean attention of POINTS² query points over all layers of each map size, over uniform's.

    `sums` holds, per (height, width) of the map, [POINTS², h, w] and the number of layers in it.
    """

    sums: dict[tuple[int, int], tuple[torch.Tensor, int]] = field(default_factory=dict)

    def add(self, attention: torch.Tensor, height: int, width: int) -> None:
        """Add one layer: attention [heads, POINTS², H·W], each row summing to 1."""
        maps = reduce(attention.float(), "heads n (h w) -> n h w", "mean", h=height)
        maps = maps * (height * width)
        size = min(height, CELLS), min(width, CELLS)
        maps = F.adaptive_avg_pool2d(maps[None], size)[0].cpu()
        before, count = self.sums.get((height, width), (0, 0))
        self.sums[height, width] = (before + maps, count + 1)

    def atlases(self) -> list[dict[str, object]]:
        """Per map size, largest first: height, width, layers, cell_height, cell_width, image.

        The image has POINTS × POINTS tiles, the tile of a query point where the point is.
        """
        entries: list[dict[str, object]] = []
        for (height, width), (total, count) in sorted(self.sums.items(), reverse=True):
            weight = (total / count).clamp(LOW, HIGH)
            shade = weight.div(LOW).log() / math.log(HIGH / LOW)
            rows, columns = weight.shape[-2:]
            tiled = rearrange(shade, "(y x) rows columns -> (y rows) (x columns)", y=POINTS)
            image = Image.fromarray(tiled.mul(255).round().byte().numpy()).convert("P")
            image.putpalette(_palette())
            entries.append(
                {
                    "height": height,
                    "width": width,
                    "layers": count,
                    "cell_height": rows,
                    "cell_width": columns,
                    "image": image,
                }
            )
        return entries


def grid_queries(height: int, width: int) -> list[int]:
    """Indices of the tokens under the middles of a POINTS × POINTS grid, row by row."""
    rows = [int((row + 0.5) * height / POINTS) for row in range(POINTS)]
    columns = [int((column + 0.5) * width / POINTS) for column in range(POINTS)]
    return [row * width + column for row in rows for column in columns]


def _palette() -> list[int]:
    """256 colors as r, g, b, …: viridis, or gray without matplotlib."""
    try:
        from matplotlib import colormaps
    except ImportError:
        return [level for level in range(256) for _ in range(3)]
    return [round(255 * part) for row in colormaps["viridis"](range(256)) for part in row[:3]]
