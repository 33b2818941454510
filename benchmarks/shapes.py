"""The measured shapes, how often each occurs in a model, and lower bounds of their time."""

import math
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """One self-attention site at one size: C channels, kernel k, a map of side² tokens."""

    name: str
    dim: int
    kernel_size: int
    side: int
    heads: int
    # Width of LinFusion's two small networks.
    linfusion: int
    gate: str = "scaled"

    @property
    def tokens(self) -> int:
        return self.side**2


class Window(NamedTuple):
    """A square of a map: its first row and column, and its side."""

    top: int
    left: int
    side: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, N, C] of a square map → the window's tokens [B, side², C]."""
        return self.wider(x, 0)[0].flatten(1, 2)

    def wider(self, x: torch.Tensor, halo: int) -> tuple[torch.Tensor, int, int]:
        """x [B, N, C] → the window with `halo` around it, clipped to the map [B, rows, columns, C].

        Also the window's first row and column in it.
        """
        size = side_of(x)
        top, left = max(0, self.top - halo), max(0, self.left - halo)
        bottom, right = (min(size, at + self.side + halo) for at in (self.top, self.left))
        crop = x.unflatten(1, (size, size))[:, top:bottom, left:right]
        return crop, self.top - top, self.left - left


def side_of(x: torch.Tensor) -> int:
    """Rows of the square map whose tokens are x [B, N, C]."""
    return math.isqrt(x.shape[1])


ROWS = (
    Row("SD1.5 level 0", 320, 7, 64, 8, 320),
    Row("SD1.5 level 0", 320, 7, 128, 8, 320),
    Row("SD1.5 level 0 up", 320, 11, 256, 8, 320),
    Row("SD1.5 level 0 up", 320, 11, 512, 8, 320),
    Row("SD1.5 level 1", 640, 9, 32, 8, 640),
    Row("SD1.5 level 2", 1280, 5, 16, 8, 1280),
    Row("SDXL level 1", 640, 9, 64, 10, 40),
    Row("SDXL level 1 up", 640, 13, 128, 10, 40),
    Row("SDXL level 2", 1280, 9, 32, 20, 80),
    Row("SDXL level 2", 1280, 9, 128, 20, 80),
    Row("PixArt", 1152, 13, 32, 16, 80, "sigmoid"),
    Row("PixArt", 1152, 13, 64, 16, 80, "sigmoid"),
    # Families whose blocks are the user's own, at 1024² and what they draw at most.
    Row("HunyuanDiT", 1408, 11, 64, 16, 88),
    Row("Wan 1.3B", 1536, 11, 64, 12, 96),
    Row("Anima, Cosmos-Predict2", 2048, 11, 64, 16, 128),
    Row("Anima, Cosmos-Predict2", 2048, 11, 128, 16, 128),
    Row("Kandinsky 5", 2560, 11, 64, 20, 160),
    Row("Wan 2.2 5B", 3072, 11, 32, 24, 192),
    Row("LTX-Video 13B", 4096, 11, 32, 32, 256),
    Row("Wan 14B, Cosmos-Predict2 14B", 5120, 11, 64, 40, 320),
)
# 256² to 16384² pixels of SD1.5, eight to a latent cell.
SWEEP = tuple(
    Row(f"{pixels}²", 320, 7, pixels // 8, 8, 320) for pixels in (256 << n for n in range(7))
)
# The demo model's sites: seconds on a machine without a GPU.
SMALL = (
    Row("demo level 0", 64, 11, 64, 4, 64),
    Row("demo level 1", 128, 9, 32, 4, 128),
    Row("demo level 2", 128, 7, 16, 4, 128),
)
# (row, how often it occurs) of one UNet call.
SD15_AT_512 = (
    (Row("level 0 down", 320, 7, 64, 8, 320), 2),
    (Row("level 0 up", 320, 11, 64, 8, 320), 3),
    (Row("level 1", 640, 9, 32, 8, 640), 5),
    (Row("level 2", 1280, 5, 16, 8, 1280), 5),
    (Row("middle", 1280, 3, 8, 8, 1280), 1),
)
SDXL_AT_1024 = (
    (Row("level 1 down", 640, 9, 64, 10, 40), 4),
    (Row("level 1 up", 640, 13, 64, 10, 40), 6),
    (Row("level 2 down", 1280, 7, 32, 20, 80), 20),
    (Row("level 2 up, middle", 1280, 9, 32, 20, 80), 40),
)
MODELS = {"SD1.5 at 512²": SD15_AT_512, "SDXL at 1024²": SDXL_AT_1024}

SCALES = (1.0, 0.5)


def bytes_moved(row: Row, batch: int, itemsize: int) -> int:
    """Bytes that any implementation of the block must move: x, y and the weights."""
    inner, dim = row.dim // 2, row.dim
    weights = dim * inner + dim * inner + dim * dim + 2 * row.kernel_size**2 * inner
    return itemsize * (2 * batch * row.tokens * dim + weights)


def depthwise_flops(row: Row, batch: int) -> float:
    """Operations of the depthwise convolutions, which matrix units cannot take directly."""
    positions = row.tokens + (row.side // 2) ** 2
    return 2.0 * batch * positions * row.kernel_size**2 * (row.dim // 2)


def floors(row: Row, batch: int, itemsize: int, bandwidth: float, flops: float | None) -> dict:
    """Seconds by memory (bytes/s `bandwidth`) and by arithmetic (fp32 operations/s `flops`)."""
    return {
        "memory": bytes_moved(row, batch, itemsize) / bandwidth,
        "arithmetic": depthwise_flops(row, batch) / flops if flops else None,
    }
