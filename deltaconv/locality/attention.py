"""Attention rows and their mass by offset (key's cell − query's cell), without an N × N map.

`measure_attention` reduces chunks of queries to two statistics per head: the entropy, and the mass
on every offset. `profile` derives windows, distances and the radial profile from the offsets.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce

# Parts that sampled queries are split into; the spread between them gives the standard error.
GROUPS = 16


@dataclass(frozen=True)
class ValueMap:
    """The linear map [E, C] of one attention module to its values, E = heads · head size."""

    matrix: torch.Tensor
    heads: int


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of one attention layer on one map of height × width cells.

    `offsets` [G, heads, 2H−1, 2W−1] is the mean mass that a query puts on the cell at that offset
    from itself (float64; the middle is the query's own cell), `pairs` [G, 2H−1, 2W−1] is the same
    for uniform attention, and `entropy` [G, heads] is in nats. G is 1 where every query was
    counted, else the number of groups that the sampled queries were split into.
    """

    height: int
    width: int
    offsets: torch.Tensor
    pairs: torch.Tensor
    entropy: torch.Tensor
    queries: int

    @property
    def exact(self) -> bool:
        """Whether every query was counted."""
        return self.queries == self.height * self.width

    def standard_error(self, per_group: torch.Tensor) -> torch.Tensor | None:
        """per_group [G, …], one statistic per group → its standard error […]; None where exact."""
        if self.exact:
            return None
        left_out = 1 - self.queries / (self.height * self.width)
        groups = per_group.shape[0]
        return per_group.std(dim=0) * (left_out / groups) ** 0.5


def memory_bound(
    batch: int, heads: int, head_dim: int, height: int, width: int, chunk_bytes: int = 2**24
) -> int:
    """Upper bound in bytes of what `measure_attention` of all queries allocates beside q and k."""
    maps, tokens = batch * heads, height * width
    chunk = max(chunk_bytes, 4 * maps * tokens)
    offsets = (2 * height - 1) * (2 * width - 1)
    # Two buffers of a chunk, float32 copies of q and k, offsets in float32 and, twice, in float64.
    return 2 * chunk + 2 * 4 * maps * tokens * head_dim + (4 + 8 + 8) * maps * offsets


@torch.no_grad()
def measure_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    height: int,
    width: int,
    *,
    scale: float | None = None,
    queries: int | None = None,
    seed: int = 0,
    chunk_bytes: int = 2**24,
    between_chunks: Callable[[], None] = lambda: None,
) -> AttentionStatistics:
    """q, k [B, heads, H·W, d] → statistics of softmax(q·kᵀ·scale), in float32, mean over B.

    `scale` defaults to 1/√d. `queries` counts a random sample of that many instead of all.
    `between_chunks` is called every `chunk_bytes` of attention and may raise to stop. Memory: see
    `memory_bound`.
    """
    batch, heads, tokens, head_dim = q.shape
    if tokens != height * width or k.shape != q.shape:
        raise ValueError(
            f"Expected q and k of one map, [B, heads, {height}·{width}, d], got "
            f"{list(q.shape)} and {list(k.shape)}. Measure plain self-attention only."
        )
    parts = _parts(tokens, queries, seed)
    maps = batch * heads
    q = q.float().mul(head_dim**-0.5 if scale is None else scale)
    q = rearrange(q, "b heads n d -> (b heads) n d")
    keys = rearrange(k.float(), "b heads n d -> (b heads) d n")
    chunk = min(tokens, max(1, chunk_bytes // (4 * maps * tokens)))
    buffers = (q.new_empty(maps * chunk * tokens), q.new_empty(maps * chunk * tokens))

    size = (2 * height - 1, 2 * width - 1)
    offsets = torch.zeros(len(parts), heads, *size, dtype=torch.float64)
    entropy = torch.zeros(len(parts), heads, dtype=torch.float64)
    pairs = torch.zeros(len(parts), *size, dtype=torch.float64)
    for group, part in enumerate(parts):
        sums = q.new_zeros(maps, *size)
        for picked in part.split(chunk):
            between_chunks()
            scores, weights = (b[: maps * len(picked) * tokens] for b in buffers)
            rows = q[:, picked.to(q.device)] if queries else q[:, picked[0] : picked[-1] + 1]
            scores = torch.bmm(rows, keys, out=scores.view(maps, len(picked), tokens))
            scores -= scores.amax(dim=-1, keepdim=True)
            weights = torch.exp(scores, out=weights.view_as(scores))
            total = weights.sum(dim=-1)
            # −Σ p log p with p = weights / total and log p = scores − log total.
            nats = total.log() - scores.mul_(weights).sum(dim=-1) / total
            entropy[group] += reduce(nats, "(b heads) n -> heads", "sum", b=batch).double().cpu()
            add_by_offset(sums, weights, total.reciprocal(), picked.tolist(), height, width)
        counted = len(part)
        sums = sums.cpu().double()
        offsets[group] = reduce(sums, "(b heads) y x -> heads y x", "mean", b=batch) / counted
        entropy[group] /= batch * counted
        if counted == tokens:
            pairs[group] = uniform_offsets(height, width)
        else:
            pairs[group] = pairs_by_offset(part.tolist(), height, width) / (counted * tokens)
    counted = sum(map(len, parts))
    return AttentionStatistics(height, width, offsets, pairs, entropy, counted)


def _parts(tokens: int, queries: int | None, seed: int) -> Sequence[torch.Tensor]:
    """Indices of the queries to count: all in one part, or a sample in equal parts."""
    if queries is None or queries >= tokens:
        return (torch.arange(tokens),)
    if queries < 2 * GROUPS:
        raise ValueError(
            f"Expected at least {2 * GROUPS} queries, which a standard error takes, got "
            f"{queries=}. Ask for more, or for all."
        )
    shuffled = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    size = queries // GROUPS
    return shuffled[: size * GROUPS].view(GROUPS, size).unbind()


def add_by_offset(
    sums: torch.Tensor,
    weights: torch.Tensor,
    share: torch.Tensor,
    queries: Sequence[int],
    height: int,
    width: int,
) -> None:
    """Add weights [maps, n, H·W] · share [maps, n] of n queries to sums [maps, 2H−1, 2W−1].

    Each key is added at its offset from the query.
    """
    # A small addition per query costs less than a scatter over every pair of query and key.
    weights = rearrange(weights, "maps n (h w) -> n maps h w", h=height)
    share = rearrange(share, "maps n -> n maps 1 1")
    for index, (rows, columns) in enumerate(_windows(queries, height, width)):
        sums[:, rows, columns].addcmul_(weights[index], share[index])


def pairs_by_offset(queries: Sequence[int], height: int, width: int) -> torch.Tensor:
    """How many of these queries have a key at each offset [2H−1, 2W−1], in float64."""
    count = torch.zeros(2 * height - 1, 2 * width - 1, dtype=torch.float64)
    for window in _windows(queries, height, width):
        count[window] += 1
    return count


def _windows(queries: Sequence[int], height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Where the H × W map, seen from each query, lies among the offsets [2H−1, 2W−1]."""
    for query in queries:
        y, x = height - 1 - query // width, width - 1 - query % width
        yield slice(y, y + height), slice(x, x + width)


def uniform_offsets(height: int, width: int) -> torch.Tensor:
    """Offsets [2H−1, 2W−1] of uniform attention over all queries: H·W·(H−|dy|)·(W−|dx|) / (H·W)³.

    The two triangular factors count the cells that a window loses at the edge of the map.
    """
    rows = height - torch.arange(1 - height, height, dtype=torch.float64).abs()
    columns = width - torch.arange(1 - width, width, dtype=torch.float64).abs()
    return rows[:, None] * columns / (height * width) ** 2


@torch.no_grad()
def attention_of(
    q: torch.Tensor, k: torch.Tensor, queries: Sequence[int], *, scale: float | None = None
) -> torch.Tensor:
    """q, k [..., N, d], indices of n queries → their attention [..., n, N]."""
    return attention_rows(q[..., list(queries), :], k, scale=scale)


def attention_rows(q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """q [..., n, d], k [..., N, d] → softmax(q·kᵀ·scale) [..., n, N] in float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q.float() * scale @ k.float().mT).softmax(dim=-1)


def windowed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    height: int,
    width: int,
    window: int,
    *,
    scale: float | None = None,
    between_rows: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """q, k, v [B, heads, H·W, d] → attention [B, heads, H·W, d] over a window around each query.

    Keys more than (window − 1) / 2 cells away in either direction are masked. Works row by row, so
    the memory is that of `window` rows of keys.
    """
    radius = window // 2
    columns = torch.arange(width, device=q.device)
    near = (columns[:, None] - columns).abs() <= radius
    q, k, v = (rearrange(t, "b heads (h w) d -> b heads h w d", h=height) for t in (q, k, v))
    rows = []
    for y in range(height):
        between_rows()
        keys, values = (t[:, :, max(0, y - radius) : y + radius + 1].flatten(2, 3) for t in (k, v))
        mask = near.repeat(1, keys.shape[2] // width)
        rows.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[:, :, y], keys, values, attn_mask=mask, scale=scale
            )
        )
    return torch.cat(rows, dim=2)
