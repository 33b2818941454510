"""The tensors of a forward pass by name, and its working memory."""

from collections.abc import Mapping
from math import ceil, prod
from typing import NamedTuple

import torch


class Buffer(NamedTuple):
    """A part of the working memory: its first byte, shape and dtype."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """This part of the memory as a tensor."""
        size = prod(self.shape) * self.dtype.itemsize
        return memory[self.start : self.start + size].view(self.dtype).view(self.shape)


# Buffers that are fp32 whatever the dtype of u: sums over the whole map.
WIDE = frozenset({"partial", "mean", "context", "partial_gradient", "strips"})


def arrange(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[dict, int]:
    """Shape by name → Buffer by name, each on a 256-byte boundary, and their size in bytes."""
    buffers, start = {}, 0
    for name, shape in shapes.items():
        kind = torch.float32 if name in WIDE else dtype
        buffers[name] = Buffer(start, shape, kind)
        start += 256 * ceil(prod(shape) * kind.itemsize / 256)
    return buffers, start


class Workspace(NamedTuple):
    """The working memory: tensors, or addresses once every launch is ready."""

    low: torch.Tensor | int
    gated_low: torch.Tensor | int
    partial: torch.Tensor | int
    mean: torch.Tensor | int
    context: torch.Tensor | int
    planes: torch.Tensor | int
    bands: torch.Tensor | int
    pyramid: torch.Tensor | int


class Tensors(NamedTuple):
    """Everything that a forward pass reads and writes, as its kernels name it.

    The last eight are those of `Workspace`. Kernels take every pointer and never read the stand-in
    of a missing tensor.
    """

    u: torch.Tensor
    x: torch.Tensor
    weight0: torch.Tensor
    weight1: torch.Tensor
    weight2: torch.Tensor
    bias0: torch.Tensor | None
    bias1: torch.Tensor | None
    bias2: torch.Tensor | None
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    pool_weight: torch.Tensor
    pool_bias: torch.Tensor
    result: torch.Tensor
    low: torch.Tensor | int
    gated_low: torch.Tensor | int
    partial: torch.Tensor | int
    mean: torch.Tensor | int
    context: torch.Tensor | int
    planes: torch.Tensor | int
    bands: torch.Tensor | int
    pyramid: torch.Tensor | int
