"""Informed initialization: a block that approximates its layer before the first training step.

The gate is opened as a constant: of every channel pair (a, b) that the gate multiplies, b gets zero
input weights, a bias β and a depthwise kernel that is κ in its centre and 0 elsewhere, so b is βκ
everywhere, at the edges too, and β·κ·√(h/2) = 1 leaves a·1 ("sigmoid": b = 0, a·½). The block is
then linear in x, and what remains is regression on the teacher's own activations:

1. y − mean y on (x − mean x), which the mean cannot touch, and on the site's value projection
   carried by each head's mean attention over offsets. The C/4 directions of largest energy, whether
   pointwise or a head's, become the a channels, with an identity or that head's offsets as kernel.
2. `conv_out`, `conv_pool`, their biases, and the output of an attention over pooled tokens, whose
   q, k and v are the layer's own, by ridge regression on what the block really computes
   from these channels, padding, pooling and upsampling included. Deep maps have fewer pixels than
   the block has channels, and the pooled branch sees one row per image: the strengths of the ridge
   on each, and the share of the solution that is taken, are chosen by the error on the other half
   of the draws. A layer that is not predictable from these keeps `conv_out` and `conv_pool` zero.
"""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from ...kernels import gated_pyramid
from ..block import DeltaConvBlock
from ..locality.attention import ValueMap
from ..tokens import PooledAttention, spread, token_means
from .least_squares import Sums, fit, leading_directions, without
from .offsets import OffsetMeans
from .settings import DistillationError
from .teacher import Visit


class Replay(Protocol):
    """Runs the teacher: equal turns show equal images, different turns different ones."""

    def __call__(self, visit: Visit, turn: int, first_batch_only: bool = False) -> None: ...


# Turns: images that choose the channels must not judge the outputs.
_CHANNELS, _OUTPUTS = 0, 1
_QUERIES = 48
# Energy, input direction [C], and the head whose offsets carry it; None: pointwise.
_Candidate = tuple[float, torch.Tensor, int | None]


@torch.no_grad()
def initialize(
    blocks: Mapping[str, DeltaConvBlock],
    replay: Replay,
    value_map: Callable[[str], ValueMap | None],
    projections: Callable[[str], torch.Tensor],
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Set every block (site → block, on the CPU) from the teacher; site → held-out relative error.

    `value_map(site)` returns the layer's value map, or None where its attention is not over the map
    itself; `projections(site)` those to its queries, keys and values [3C, C], asked for where a
    block has pooled tokens. `progress` hears the share done. The error is measured on the other
    half of the draws, each with its own noise; one image may be in both halves. It is at most 1,
    that of a block that returns zero. Raises DistillationError, before any block is changed, where
    the activations are not finite.
    """
    maps = {site: value_map(site) for site in blocks}
    offsets = _mean_offsets(maps, replay, generator)
    # A layer whose q and k nobody can see has no mean attention.
    maps = {site: values if site in offsets else None for site, values in maps.items()}
    progress(0.05)
    sums = _direction_sums(blocks, maps, offsets, replay)
    for site, found in sums.items():
        if not (found.features.isfinite().all() and math.isfinite(found.power)):
            raise DistillationError(
                f"Expected finite activations of the base, got NaN or infinite ones at {site}. "
                "Load the base to compute in bfloat16 or float32."
            )
    for index, (site, block) in enumerate(blocks.items()):
        progress(0.35 + 0.15 * index / len(blocks))
        _set_channels(block, sums.pop(site), maps[site], offsets.get(site))
        if block.heads:
            block.tokens.qkv.weight.copy_(projections(site))
    return _solve(blocks, replay, lambda share: progress(0.5 + share / 2), from_zero=True)


@torch.no_grad()
def refit(
    blocks: Mapping[str, DeltaConvBlock],
    replay: Replay,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Move every block's `conv_out`, `conv_pool` and tokens' `out` to the least-squares solution.

    The step is as long as lowers the error on held-out images, which is returned by site over the
    power of the layer's output. All other parameters stay; valid at any time in training.
    """
    return _solve(blocks, replay, progress, from_zero=False)


def _solve(
    blocks: Mapping[str, DeltaConvBlock],
    replay: Replay,
    progress: Callable[[float], None],
    from_zero: bool,
) -> dict[str, float]:
    halves = {}
    for site, block in blocks.items():
        width = len(_groups(block))
        halves[site] = (Sums.empty(width, block.dim), Sums.empty(width, block.dim))
    seen = dict.fromkeys(blocks, 0)

    def visit(site, x, attend):
        y = attend()
        if site in blocks:
            # Every other image, also where they come one by one.
            for parity in range(2):
                rows = slice((parity - seen[site]) % 2, None, 2)
                if len(x[rows]):
                    features = _output_features(blocks[site], x[rows].float())
                    halves[site][parity].add(_rows(features), _rows(y[rows]))
            seen[site] += len(x)
        return y

    replay(visit, _OUTPUTS)
    errors = {}
    for index, (site, block) in enumerate(blocks.items()):
        progress(0.5 + 0.5 * index / len(blocks))
        errors[site] = _set_outputs(block, halves.pop(site), from_zero)
    progress(1.0)
    return errors


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, W, F] → [B·H·W, F]."""
    return rearrange(x, "b h w f -> (b h w) f")


def _output_features(block: DeltaConvBlock, x: torch.Tensor) -> torch.Tensor:
    """x [B, H, W, C] → [B, H, W, F]: what conv_out, conv_pool and the tokens' out are linear in."""
    u = F.linear(x, block.conv_up.weight.to(x), block.conv_up.bias.to(x))
    kernels, biases = block.depthwise_like(u)
    pyramid = gated_pyramid(u, kernels, block.scales, block.gate, biases)
    mean = x.mean((1, 2), keepdim=True).expand_as(x)
    features = [pyramid, mean]
    if block.heads:
        features.append(spread(_mixed(block.tokens, x), *x.shape[1:3]))
    return torch.cat([*features, torch.ones_like(x[..., :1])], dim=-1)


def _mixed(tokens: PooledAttention, x: torch.Tensor) -> torch.Tensor:
    """What every token of x sees, where x, but not the block, may be on an accelerator."""
    return tokens.attended(F.linear(token_means(x), tokens.qkv.weight.to(x)))


def _groups(block: DeltaConvBlock) -> torch.Tensor:
    """A strength [F] for the pyramid, one for the mean, one for the tokens, none for a constant."""
    sizes = [block.conv_out.in_features, block.dim, *([block.dim] if block.heads else ())]
    groups = [group for group, size in enumerate(sizes, start=1) for _ in range(size)]
    return torch.tensor([*groups, 0])


def _set_outputs(block: DeltaConvBlock, halves: tuple[Sums, Sums], from_zero: bool) -> float:
    linears = [block.conv_out, block.conv_pool, *([block.tokens.out] if block.heads else ())]
    start = None
    if not from_zero:
        bias = block.conv_out.bias + block.conv_pool.bias
        now = (*(linear.weight.T for linear in linears), bias[None])
        start = torch.cat([part.double() for part in now])
    weight, error = fit(halves, _groups(block), start)
    parts = weight[:-1].split([linear.in_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.copy_(part.T)
    block.conv_out.bias.copy_(weight[-1])
    block.conv_pool.bias.zero_()
    return error


def _mean_offsets(
    maps: Mapping[str, ValueMap | None], replay: Replay, generator: torch.Generator
) -> dict[str, OffsetMeans]:
    offsets: dict[str, OffsetMeans] = {}

    def visit(site, x, attend):
        if (values := maps.get(site)) is None:
            return attend()
        height, width = x.shape[1:3]
        count = min(_QUERIES, height * width)

        def look(q, k, scale):
            means = offsets.setdefault(site, OffsetMeans(values.heads, height, width))
            if (height, width) == means.size:
                for image in zip(q, k, strict=True):
                    queries = torch.randperm(height * width, generator=generator)[:count]
                    means.add(*image, queries, scale)

        return attend(look)

    replay(visit, _CHANNELS, first_batch_only=True)
    return offsets


def _direction_sums(
    blocks: Mapping[str, DeltaConvBlock],
    maps: Mapping[str, ValueMap | None],
    offsets: Mapping[str, OffsetMeans],
    replay: Replay,
) -> dict[str, Sums]:
    """Per site, sums of the centered x beside the centered, attention-carried values."""
    sums, carriers = {}, {}
    for site, block in blocks.items():
        heads = maps[site]
        width = block.dim + (len(heads.matrix) if heads else 0)
        sums[site] = Sums.empty(width, block.dim)
        if heads:
            kernels = offsets[site].kernels(block.kernel_size, block.scales[0])
            carriers[site] = (heads.matrix, kernels)

    def centered(rows):
        return _rows(rows - rows.mean((1, 2), keepdim=True))

    def visit(site, x, attend):
        y = attend()
        if site in blocks:
            x = x.float()
            features = [centered(x)]
            if site in carriers:
                value, kernels = carriers[site]
                carried = _carry(x @ value.to(x).T, kernels.to(x))
                features.append(centered(carried))
            sums[site].add(torch.cat(features, dim=-1), centered(y.float()))
        return y

    replay(visit, _CHANNELS)
    return sums


def _carry(values: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """values [B, H, W, E], kernels [heads, k, k] → each head's values under its own kernel."""
    channels = values.shape[-1]
    per_channel = repeat(kernels, "n k l -> (n e) 1 k l", e=channels // len(kernels))
    maps = rearrange(values, "b h w e -> b e h w")
    carried = F.conv2d(maps, per_channel, padding=kernels.shape[-1] // 2, groups=channels)
    return rearrange(carried, "b e h w -> b h w e")


def _set_channels(
    block: DeltaConvBlock,
    sums: Sums,
    heads: ValueMap | None,
    offsets: OffsetMeans | None,
) -> None:
    """Choose the a channels by energy, give them their kernels, and open the gate."""
    dim, half, size = block.dim, block.dim // 4, block.kernel_size
    pointwise = Sums(sums.features[:dim, :dim], sums.cross[:dim], sums.power, sums.count)
    directions, energies = leading_directions(pointwise, half)
    candidates: list[_Candidate] = [
        (energy, row, None) for energy, row in zip(energies.tolist(), directions, strict=True)
    ]
    if heads:
        candidates += _head_candidates(sums, dim, heads, half)
    chosen = sorted(candidates, key=lambda candidate: -candidate[0])[:half]

    identity = torch.zeros(size, size)
    identity[size // 2, size // 2] = 1
    block.conv_up.weight.zero_()
    block.conv_up.bias.zero_()
    for channel, (_, row, _) in enumerate(chosen):
        block.conv_up.weight[channel] = row.float()
    opening = 1.0
    if block.gate == "scaled":
        opening = half**-0.25
        block.conv_up.bias[half:] = opening
    for level, scale in enumerate(block.scales):
        kernel = block.get_parameter(f"gates.{level}.conv_spatial.weight")
        if level in block.biased:
            block.get_parameter(f"gates.{level}.conv_spatial.bias").zero_()
        kernel[..., half:] = opening * identity[..., None]
        per_head = offsets.kernels(size, scale) if offsets else None
        for channel, (_, _, head) in enumerate(chosen):
            if head is not None and per_head is not None:
                kernel[..., channel] = per_head[head]
            elif scale == 1 or per_head is None:
                kernel[..., channel] = identity
            else:
                # On a smaller map an identity would only blur what the full map has.
                kernel[..., channel] = per_head.mean(0)


def _head_candidates(sums: Sums, dim: int, heads: ValueMap, rank: int) -> list[_Candidate]:
    """What each head adds to the pointwise part."""
    rest = without(sums, dim)
    size = len(heads.matrix) // heads.heads
    found: list[_Candidate] = []
    for head in range(heads.heads):
        rows = slice(head * size, (head + 1) * size)
        part = Sums(rest.features[rows, rows], rest.cross[rows], rest.power, rest.count)
        directions, energies = leading_directions(part, min(rank, size))
        value = heads.matrix[rows].double().cpu()
        for energy, row in zip(energies.tolist(), directions, strict=True):
            direction = row @ value
            # Unit power of the input, as for the pointwise channels.
            power = direction @ sums.features[:dim, :dim] @ direction / max(sums.count, 1)
            found.append((energy, direction * power.clamp_min(1e-12).rsqrt(), head))
    return found
