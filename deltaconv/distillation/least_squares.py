"""Linear regression from running second moments: no activation is stored."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

# Ridge strengths tried, relative to each feature's own power.
_STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0, 100.0)
# The search's starting index.
_START = 4


@dataclass
class Sums:
    """Second moments of features [N, F] and targets [N, T], in float64 on the CPU."""

    features: torch.Tensor
    cross: torch.Tensor
    power: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, features: int, targets: int) -> "Sums":
        """Sums of no rows."""
        return cls(
            torch.zeros(features, features, dtype=torch.float64),
            torch.zeros(features, targets, dtype=torch.float64),
        )

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """features [N, F], targets [N, T]: add these rows."""
        features, size = _unit_range(features.float())
        targets, target_size = _unit_range(targets.float())
        self.features += (features.T @ features).double().cpu() * size**2
        self.cross += (features.T @ targets).double().cpu() * (size * target_size)
        self.power += targets.square().sum().item() * target_size**2
        self.count += len(features)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.features + other.features,
            self.cross + other.cross,
            self.power + other.power,
            self.count + other.count,
        )

    def beyond(self, weight: torch.Tensor) -> "Sums":
        """Sums of the same features and the residuals of `weight` [F, T] on the targets."""
        explained = self.features @ weight
        power = self.power + (weight * (explained - 2 * self.cross)).sum().item()
        return Sums(self.features, self.cross - explained, max(power, 0.0), self.count)


def ridge(sums: Sums, strength: torch.Tensor | float) -> torch.Tensor:
    """Weight [F, T] that minimises the squared error plus `strength` times each feature's power.

    `strength` is one number or one per feature [F].
    """
    power = sums.features.diagonal()
    # Normalize features to unit power: channels differ by orders of magnitude.
    scale = torch.where(power > 0, power.rsqrt(), 0.0)
    system = sums.features * scale[:, None] * scale
    system.diagonal().add_(torch.as_tensor(strength, dtype=torch.float64) + 1e-9)
    # `solve` raises on a singular system; solve_ex returns non-finite values, which `_gain` tests.
    solution, _ = torch.linalg.solve_ex(system, sums.cross * scale[:, None])
    return solution * scale[:, None]


def fit(
    halves: Sequence[Sums], groups: torch.Tensor, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Weight [F, T] from two halves of the data, and its held-out error over the targets' power.

    `groups` [F] numbers the features: those of one group, from 1 up, share a ridge strength, and
    group 0 keeps the weakest. The strengths are chosen by fitting one half and judging on the
    other, and so is the share that is taken of the way from `start` [F, T], else zero, to the
    solution: the held-out error is never above that of `start`, nor above 1 where there is none.
    The weight itself is fitted on both halves.
    """
    power = halves[0].power + halves[1].power
    weight = torch.zeros_like(halves[0].cross) if start is None else start.clone()
    if start is not None:
        halves = [half.beyond(start) for half in halves]
    trials: dict[tuple[int, ...], tuple[float, float]] = {}

    def gain(levels: tuple[int, ...]) -> float:
        if levels not in trials:
            trials[levels] = _gain(halves, _per_feature(groups, levels))
        return trials[levels][0]

    levels = _climb(gain, int(groups.max()))
    left = halves[0].power + halves[1].power
    best, (_, share) = gain(levels), trials[levels]
    if share:
        # Strengths are relative to the rows' power, while their noise asks for an absolute one:
        # for twice the rows, half of it.
        strength = _per_feature(groups, levels) / 2
        weight += share * ridge(halves[0] + halves[1], strength)
        left = max(left - best, 0.0)
    return weight, left / power if power else 0.0


def _per_feature(groups: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    """Ridge strength [F] of features whose groups from 1 up have these of `_STRENGTHS`."""
    return torch.tensor([_STRENGTHS[level] for level in (0, *levels)]).double()[groups]


def _gain(halves: Sequence[Sums], strength: torch.Tensor) -> tuple[float, float]:
    """By how much a share of each half's solution lowers the other's squared error, and the share.

    With w from one half and F, c of the other, error(α) = power − 2α·w·c + α²·w·Fw, summed over
    both ways round; at the best α of 0…1 it is never above the power. No gain is a negative one.
    """
    agreement = size = 0.0
    for fitted, other in (halves, reversed(halves)):
        weight = ridge(fitted, strength)
        agreement += (weight * other.cross).sum().item()
        size += (weight * (other.features @ weight)).sum().item()
    if not math.isfinite(agreement + size):
        return -math.inf, 0.0
    if agreement <= 0:
        return agreement, 0.0
    share = min(1.0, agreement / size) if size > 0 else 1.0
    return share * (2 * agreement - share * size), share


def _climb(gain: Callable[[tuple[int, ...]], float], groups: int) -> tuple[int, ...]:
    """The levels of `_STRENGTHS`, one per group, next to which no single level gains more."""
    levels, before = (_START,) * groups, None
    while levels != before:
        before = levels
        for group, step in product(range(groups), (1, -1)):
            while 0 <= levels[group] + step < len(_STRENGTHS):
                tried = (*levels[:group], levels[group] + step, *levels[group + 1 :])
                if gain(tried) <= gain(levels):
                    break
                levels = tried
    return levels


def _unit_range(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """x over its largest magnitude, and that: squares of neither end leave float32's range."""
    size = x.abs().max().item() if x.numel() else 0.0
    return (x / size, size) if size else (x, 1.0)


def leading_directions(sums: Sums, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-limited regression: input directions [rank, F], energies [rank], descending.

    Reduced-rank regression: project the full solution on the leading eigenvectors of its fitted
    targets. Each direction is scaled to give a feature of unit power.
    """
    weight = ridge(sums, 1e-5)
    fitted = weight.T @ sums.features @ weight
    energies, basis = torch.linalg.eigh((fitted + fitted.T) / 2)
    energies, basis = energies.flip(0)[:rank], basis.flip(1)[:, :rank]
    directions = (weight @ basis).T
    power = ((directions @ sums.features) * directions).sum(1) / max(sums.count, 1)
    return directions * power.clamp_min(1e-12).rsqrt()[:, None], energies.clamp_min(0)


def without(sums: Sums, known: int) -> Sums:
    """Sums of the features after the first `known`, their overlap with those regressed away."""
    head, tail = slice(0, known), slice(known, None)
    system = sums.features[head, head].clone()
    system.diagonal().add_(1e-6 * system.diagonal().mean().clamp_min(1e-12))
    overlap = torch.linalg.solve(system, sums.features[head, tail])
    return Sums(
        sums.features[tail, tail] - sums.features[tail, head] @ overlap,
        sums.cross[tail] - overlap.T @ sums.cross[head],
        sums.power,
        sums.count,
    )
