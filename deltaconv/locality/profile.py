"""From mass by offset to windows, distances and radial profiles, and what the offset leaves out.

Every function takes offsets [..., 2H−1, 2W−1] that sum to 1, measured or uniform, in float64.
"""

import functools

import torch


def window_widths(height: int, width: int) -> list[int]:
    """Odd window widths from the query's own cell to the window that always holds the map."""
    return list(range(1, 2 * max(height, width), 2))


def window_mass(offsets: torch.Tensor) -> torch.Tensor:
    """offsets [..., 2H−1, 2W−1] → mass [..., len(window_widths)] within each Chebyshev window."""
    dy, dx = _cells(*offsets.shape[-2:])
    ring = torch.maximum(dy.abs(), dx.abs()).flatten()
    mass = offsets.new_zeros(*offsets.shape[:-2], int(ring.max()) + 1)
    return mass.index_add_(-1, ring, offsets.flatten(-2)).cumsum(dim=-1)


def mean_distance(offsets: torch.Tensor) -> torch.Tensor:
    """offsets [..., 2H−1, 2W−1] → mean Euclidean distance [...], in cells."""
    dy, dx = _cells(*offsets.shape[-2:])
    return (offsets * (dy**2 + dx**2).double().sqrt()).sum(dim=(-2, -1))


@functools.lru_cache(maxsize=32)
def ring_distances(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Size of the offsets → distance of each ring [R], and the ring of each offset [rows·columns].

    Each distance below 8 cells has its ring; farther out a ring is one cell thick, and its distance
    is the root of the mean square over its offsets.
    """
    dy, dx = _cells(rows, columns)
    squared = (dy**2 + dx**2).flatten()
    thick = 64 + squared.double().sqrt().round().long()
    _, ring = torch.where(squared < 64, squared, thick).unique(return_inverse=True)
    count = torch.bincount(ring)
    return (torch.bincount(ring, weights=squared.double()) / count).sqrt(), ring


def ring_mass(offsets: torch.Tensor) -> torch.Tensor:
    """offsets [..., 2H−1, 2W−1] → mass [..., R] on each ring of `ring_distances`."""
    distances, ring = ring_distances(*offsets.shape[-2:])
    mass = offsets.new_zeros(*offsets.shape[:-2], len(distances))
    return mass.index_add_(-1, ring, offsets.flatten(-2))


def content(offsets: torch.Tensor, pairs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """offsets [..., 2H−1, 2W−1], uniform's, entropy [...] → nats [...] that offsets leave out.

    The mean Kullback–Leibler divergence of each query's attention from the attention that depends
    on the offset alone: 0 if position determines it, large if the picture's content does.
    """
    tokens = (pairs.shape[-2] + 1) * (pairs.shape[-1] + 1) / 4
    per_key = offsets / (pairs * tokens).clamp_min(torch.finfo(torch.float64).tiny)
    by_position = -torch.special.xlogy(offsets, per_key).sum(dim=(-2, -1))
    return (by_position - entropy).clamp_min(0)


def _cells(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets dy [rows, 1] and dx [1, columns], whole cells, the middle being 0."""
    dy = torch.arange(rows) - rows // 2
    dx = torch.arange(columns) - columns // 2
    return dy[:, None], dx[None, :]
