"""What a plan is made from, a call's shape, and what it comes to, its launches."""

from collections.abc import Mapping
from itertools import accumulate
from math import ceil
from typing import NamedTuple

import torch

from ..reference import pooled_size
from .launch import Launch
from .workspace import Buffer, Workspace

# Programs that sum x: more of them only make more partial sums.
SUM_PROGRAMS = 1024
# Channels that such a program sums.
SUMS = 64


class Shape(NamedTuple):
    """What a plan depends on: u [batch, height, width, channels], the pyramid, dtype and device."""

    batch: int
    height: int
    width: int
    channels: int
    kernel_size: int
    scales: tuple[float, ...]
    gate: str
    dtype: torch.dtype
    device: torch.device
    # A bit for every level with a bias.
    biased: int = 0
    # How the forward pass convolves, one of `backend.CONVOLUTIONS`.
    convolution: str = "rows"

    @property
    def half(self) -> int:
        return self.channels // 2

    @property
    def gain(self) -> float:
        """√(h/2), the factor of the `scaled` gate."""
        return self.half**0.5

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every level, the full one first."""
        return [pooled_size(self.height, self.width, scale) for scale in self.scales]

    @property
    def low_positions(self) -> int:
        """Positions of all lower levels together, over the batch."""
        return self.batch * sum(rows * columns for rows, columns in self.sizes[1:])


def padded_starts(counts: list[int], slots: int) -> list[int]:
    """First program of every role, then the end of the last: `slots` + 1 running totals."""
    return [0, *accumulate(counts + [0] * (slots - len(counts)))]


def levels_of(shape: Shape) -> dict[str, int]:
    """Batch and the size of every level; missing levels are 1 × 1."""
    (height, width), (height1, width1), (height2, width2) = [*shape.sizes, (1, 1), (1, 1)][:3]
    sizes = {"batch": shape.batch, "height": height, "width": width}
    return sizes | {"height1": height1, "width1": width1, "height2": height2, "width2": width2}


def exact_span(shape: Shape, size: tuple[int, int]) -> int:
    """n if every pooled position is the mean of n × n others, 0 if windows differ in size."""
    for span in (2, 3, 4):
        if (shape.height, shape.width) == (span * size[0], span * size[1]):
            return span
    return 0


class Sums(NamedTuple):
    """How x [B, tokens, C] is summed: tokens per chunk, chunks, programs that add the chunks up."""

    chunk: int
    chunks: int
    programs: int


def sums_of(shape: Shape, dim: int | None) -> Sums:
    """Enough chunks to fill the device, none below 64 tokens; no programs without x."""
    tokens, blocks = shape.height * shape.width, ceil((dim or 1) / SUMS)
    chunk = 64 * ceil(tokens / 64 / max(1, SUM_PROGRAMS // (shape.batch * blocks)))
    return Sums(chunk, ceil(tokens / chunk), shape.batch * blocks if dim else 0)


class Forward(NamedTuple):
    """The launches of a forward pass in order; three of them by name, None where not needed.

    `buffers` are those of `Workspace`. Without a projection the pyramid is the result, and its
    buffer empty.
    """

    launches: tuple[Launch, ...]
    pool: Launch | None
    upsample: Launch | None
    project: Launch | None
    buffers: Mapping[str, Buffer]
    starts: tuple[int, ...]
    size: int

    def memory(self, device: torch.device) -> tuple[torch.Tensor, Workspace]:
        """Working memory, to be kept alive until the launches are queued, and the buffers in it.

        Addresses once every launch takes them: making a tensor for each takes the host longer than
        the launches run.
        """
        memory = torch.empty(self.size, dtype=torch.uint8, device=device)
        if all([launch.ready for launch in self.launches]):
            start = memory.data_ptr()
            return memory, Workspace._make([start + offset for offset in self.starts])
        return memory, Workspace._make([buffer.of(memory) for buffer in self.buffers.values()])


class ProjectionTile(NamedTuple):
    """Tokens × outputs of one program of the product, inner channels per step, warps, stages."""

    tokens: int
    outputs: int
    inner: int
    warps: int
    stages: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory that the stages take in 16 bits."""
        return 2 * (self.tokens + self.outputs) * self.inner * self.stages
