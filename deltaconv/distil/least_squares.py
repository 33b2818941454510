"""Linear regression from running sums: no activation is kept, and held-out error costs nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Ridge strengths tried, relative to each feature's own power.
_STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0, 100.0)


@dataclass
class Sums:
    """Second moments of features [N, F] and targets [N, T], in float64 on the CPU."""

    features: torch.Tensor
    cross: torch.Tensor
    power: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, features: int, targets: int) -> "Sums":
        """Sums over nothing yet."""
        return cls(
            torch.zeros(features, features, dtype=torch.float64),
            torch.zeros(features, targets, dtype=torch.float64),
        )

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """features [N, F], targets [N, T]: count these rows in."""
        features, targets = features.float(), targets.float()
        self.features += (features.T @ features).double().cpu()
        self.cross += (features.T @ targets).double().cpu()
        self.power += targets.square().sum().item()
        self.count += len(features)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.features + other.features,
            self.cross + other.cross,
            self.power + other.power,
            self.count + other.count,
        )

    def error(self, weight: torch.Tensor) -> float:
        """Squared error of `weight` [F, T] on these rows, over the power of the targets."""
        fit = (weight * (self.features @ weight - 2 * self.cross)).sum().item()
        return (self.power + fit) / max(self.power, 1e-30)


def ridge(sums: Sums, strength: torch.Tensor | float) -> torch.Tensor:
    """Weight [F, T] that minimises the squared error plus `strength` times each feature's power.

    `strength` is one number or one per feature [F].
    """
    power = sums.features.diagonal().clamp_min(1e-12)
    # Unit-power features first: powers differ by orders of magnitude between channels.
    scale = power.rsqrt()
    system = sums.features * scale[:, None] * scale
    system.diagonal().add_(torch.as_tensor(strength, dtype=torch.float64) + 1e-9)
    return torch.linalg.solve(system, sums.cross * scale[:, None]) * scale[:, None]


def fit(halves: Sequence[Sums], penalised: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Weight [F, T] from two halves of the data, and its held-out relative error.

    `penalised` [F] marks features whose ridge strength is chosen by fitting one half and judging
    on the other; the rest keep the weakest. The weight itself is fitted on both halves.
    """
    first, second = halves
    mask = penalised.double()

    def held_out(strength: float) -> float:
        per_feature = _STRENGTHS[0] + mask * strength
        return second.error(ridge(first, per_feature)) + first.error(ridge(second, per_feature))

    errors = {strength: held_out(strength) for strength in _STRENGTHS}
    best = min(errors, key=errors.get)
    return ridge(first + second, _STRENGTHS[0] + mask * best), errors[best] / 2


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
