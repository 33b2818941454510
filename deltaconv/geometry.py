"""The published tensor names of one block, the layouts they come in, and what their shapes say."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

SCALES_BY_COUNT = {1: (1.0,), 2: (1.0, 0.5), 3: (1.0, 0.5, 1 / 3)}

_DEPTHWISE = re.compile(r"gates\.(\d+)\.conv_spatial\.weight")
_DEPTHWISE_BIAS = re.compile(r"gates\.(\d+)\.conv_spatial\.bias")
# Our own, in no published file: its length is the number of heads.
_HEADS = "tokens.scale.weight"
# Tensors that may be missing, and are zero then; the depthwise biases are the others.
_OPTIONAL = {"conv_up.bias"}


@dataclass(frozen=True)
class BlockPlan:
    """The block at a site: kernel k and scales as fractions of H × W; its dim is the site's.

    `biased` are the scales, by index, whose depthwise convolution has a bias. `heads` are those of
    its attention over pooled tokens, 0 for a published block, which has none.
    """

    kernel: int
    scales: tuple[float, ...] = SCALES_BY_COUNT[2]
    biased: tuple[int, ...] = ()
    heads: int = 0

    def geometry(self, dim: int) -> "BlockGeometry":
        """What the tensors of this block say at a site of `dim` channels."""
        return BlockGeometry(dim, self.kernel, len(self.scales), self.biased, self.heads)


@dataclass(frozen=True)
class BlockGeometry:
    """What the tensors of a block say about it: dim C, kernel k, number of scales S.

    `biased` are the scales, by index, whose depthwise convolution has a bias; `heads`, see
    `BlockPlan`.
    """

    dim: int
    kernel_size: int
    num_scales: int
    biased: tuple[int, ...] = ()
    heads: int = 0

    def plan(self, scales: tuple[float, ...]) -> BlockPlan:
        """The block at its site, with `scales`, of which its tensors say the number alone."""
        return BlockPlan(self.kernel_size, scales, self.biased, self.heads)

    @property
    def parameters(self) -> int:
        """Number of parameters of the block."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name → canonical shape of every tensor of the block."""
        c, h, k = self.dim, self.dim // 2, self.kernel_size
        shapes: dict[str, tuple[int, ...]] = {"conv_up.weight": (h, c), "conv_up.bias": (h,)}
        for scale in range(self.num_scales):
            shapes[f"gates.{scale}.conv_spatial.weight"] = (k, k, h)
            if scale in self.biased:
                shapes[f"gates.{scale}.conv_spatial.bias"] = (h,)
        shapes["conv_out.weight"] = (c, h // 2 * self.num_scales)
        shapes["conv_out.bias"] = (c,)
        shapes["conv_pool.weight"] = (c, c)
        shapes["conv_pool.bias"] = (c,)
        if self.heads:
            shapes[_HEADS] = (self.heads,)
            shapes["tokens.qkv.weight"] = (3 * c, c)
            shapes["tokens.out.weight"] = (c, c)
        return shapes


def check_geometry(dim: int, kernel_size: int, heads: int = 0) -> list[str]:
    """Sentences that say why no block can have these; empty when it can."""
    problems = []
    if dim < 4 or dim % 4:
        problems.append(f"dim must be a positive multiple of 4 (two halves of C/2), got {dim=}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        problems.append(f"kernel_size must be odd and positive, got {kernel_size=}")
    if heads < 0 or (heads and dim % heads):
        problems.append(f"heads must divide dim, or be 0, got {heads=} for {dim=}")
    return problems


def canonical_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape after `canonical_tensor`: 1 × 1 convolutions flatten, [h, 1, k, k] turns."""
    shape = tuple(shape)
    if _DEPTHWISE.fullmatch(name):
        if len(shape) == 4 and shape[1] == 1:
            return (shape[2], shape[3], shape[0])
    elif len(shape) == 4 and shape[2:] == (1, 1):
        return shape[:2]
    return shape


def canonical_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the published layout: Linear [out, in], depthwise [k, k, h], contiguous."""
    if canonical_shape(name, tensor.shape) == tuple(tensor.shape):
        return tensor.contiguous()
    if _DEPTHWISE.fullmatch(name):
        return tensor[:, 0].permute(1, 2, 0).contiguous()
    return tensor[:, :, 0, 0].contiguous()


def read_geometry(shapes: Mapping[str, Sequence[int]]) -> BlockGeometry:
    """Published names and shapes of one block, in any layout → its geometry.

    `conv_up.bias` and depthwise biases may be missing. Raises ValueError with every missing,
    surplus and misshapen tensor in one message.
    """
    found = {name: canonical_shape(name, shape) for name, shape in shapes.items()}
    scales = [int(match[1]) for match in map(_DEPTHWISE.fullmatch, found) if match]
    # A stray gates.999999 must not make a million "missing" names.
    num_scales = max((s for s in scales if s < 8), default=0) + 1
    dim = _first(found, (("conv_pool.weight", 1), ("conv_up.weight", 1), ("conv_out.weight", 0)))
    depthwise = [f"gates.{scale}.conv_spatial.weight" for scale in range(num_scales)]
    kernel_size = _first(found, ((name, 0) for name in depthwise))
    heads = math.prod(found[_HEADS]) if _HEADS in found else 0
    problems = check_geometry(dim, kernel_size, heads) if dim and kernel_size else []

    biased = sorted({int(match[1]) for match in map(_DEPTHWISE_BIAS.fullmatch, found) if match})
    biased = tuple(scale for scale in biased if scale < num_scales)
    geometry = BlockGeometry(dim or 0, kernel_size or 0, num_scales, biased, heads)
    expected = geometry.shapes()
    if missing := sorted(expected.keys() - found.keys() - _OPTIONAL):
        problems.append(f"missing: {', '.join(missing)}")
    if surplus := sorted(found.keys() - expected.keys()):
        problems.append(f"not part of a block: {', '.join(surplus)}")
    if not problems:
        for name, shape in expected.items():
            if found.get(name, shape) != shape:
                reason = " (one kernel size per block)" if name in depthwise else ""
                problems.append(f"{name} is {list(found[name])}, expected {list(shape)}{reason}")
    if problems:
        raise ValueError("These tensors do not make a ΔConvBlock: " + "; ".join(problems) + ".")
    return geometry


def complete_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State in any published layout → the published one, as a block with these tensors has it.

    A missing `conv_up.bias` becomes zeros, a depthwise bias of zeros is left out: both mean the
    same. Raises ValueError as `read_geometry` does.
    """
    read_geometry({name: tensor.shape for name, tensor in state.items()})
    full = {name: canonical_tensor(name, tensor) for name, tensor in state.items()}
    if "conv_up.bias" not in full:
        weight = full["conv_up.weight"]
        full["conv_up.bias"] = weight.new_zeros(weight.shape[0])
    idle = {name for name in full if _DEPTHWISE_BIAS.fullmatch(name) and not full[name].any()}
    return {name: tensor for name, tensor in full.items() if name not in idle}


def default_scales(num_scales: int) -> tuple[float, ...]:
    """The published scales for a block of that many: 1, 1/2, 1/3 in that order."""
    if num_scales not in SCALES_BY_COUNT:
        raise ValueError(
            f"Expected scales to be given: {num_scales=}, and only 1 to 3 have defaults."
        )
    return SCALES_BY_COUNT[num_scales]


def _first(shapes: Mapping[str, tuple[int, ...]], sources: Iterable[tuple[str, int]]) -> int | None:
    for name, axis in sources:
        if len(shapes.get(name, ())) >= 2:
            return shapes[name][axis]
    return None
