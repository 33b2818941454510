"""Which layers keep attention, and from which step on blocks act: time saved against error."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# Preset → share of the time that blocks everywhere would save; `fastest` saves what there is.
SHARES = {"balanced": 0.6, "fastest": 0.0, "faithful": 0.3}
FASTEST = "fastest"
LEAST_SAVED = SHARES["faithful"]
# Shares add up from products of fractions.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class SiteCost:
    """What a layer takes per model call as attention and as its block: seconds, else FLOPs."""

    attention: float
    block: float
    timed: bool = True

    @property
    def saved(self) -> float:
        """What the block saves; 0 where it is not the faster one, and not worth replacing by."""
        return max(0.0, self.attention - self.block)


@dataclass(frozen=True)
class ChoicePoint:
    """Blocks in `replaced` layers from `start` of sampling on, what that saves, and its error.

    `saved` is a share of the time that blocks in all layers save in all steps; `error` the mean
    square by which latents end up elsewhere than with attention, over the power of those.
    """

    replaced: tuple[str, ...]
    start: float
    saved: float
    error: float

    @property
    def decibels(self) -> float:
        """The error as −10·log10: the higher, the closer to attention."""
        return -10 * math.log10(max(self.error, 1e-12))


@dataclass(frozen=True)
class TradeOff:
    """All points that were sampled, each with its latents [B, C, H, W], and what led there.

    `alone` maps a site to the decibels that keeping attention there alone brings, estimated, mean
    over the starts; sites without which too little is saved are missing. `growth` tells by step
    how an error made there grows until the end. `measurements` counts sets of layers.
    """

    latents: Mapping[ChoicePoint, torch.Tensor]
    costs: Mapping[str, SiteCost]
    alone: Mapping[str, float]
    growth: Sequence[float]
    measurements: int

    @property
    def points(self) -> tuple[ChoicePoint, ...]:
        """In the order of sampling."""
        return tuple(self.latents)

    @property
    def front(self) -> tuple[ChoicePoint, ...]:
        """The Pareto front, least saved first: no point saves as much at a lower error."""
        return pareto(self.points)

    @property
    def total(self) -> float:
        """What blocks in all layers save per model call."""
        return total_saved(self.costs)


def pareto(points: Sequence[ChoicePoint]) -> tuple[ChoicePoint, ...]:
    """Those than which no other saves as much at a lower error, least saved first."""
    front: list[ChoicePoint] = []
    for point in sorted(points, key=lambda point: (-point.saved, point.error)):
        if not front or point.error < front[-1].error:
            front.append(point)
    return tuple(reversed(front))


def total_saved(costs: Mapping[str, SiteCost]) -> float:
    """What blocks in all layers save per model call."""
    return sum(cost.saved for cost in costs.values())


def share_saved(costs: Mapping[str, SiteCost], replaced: Sequence[str], start: float) -> float:
    """Share of the time that blocks in all layers and steps save, by these from `start` on."""
    return (1 - start) * sum(costs[site].saved for site in replaced) / total_saved(costs)


def saves(point_saved: float, share: float) -> bool:
    """Whether a share is reached, up to rounding."""
    return point_saved >= share - _ROUNDING


def share_wanted(wanted: str | float) -> float:
    """The share of the time that a preset of SHARES, or an own share, asks for; else ValueError."""
    if isinstance(wanted, str):
        if wanted not in SHARES:
            raise ValueError(f"Expected one of {', '.join(SHARES)}, got {wanted!r}. Choose one.")
        return SHARES[wanted]
    if not 0 < wanted <= 1:
        raise ValueError(
            f"Expected a share of the time above 0 and at most 1, got {wanted:g}. Ask for a part "
            "of what blocks in all layers and steps save, such as 0.6."
        )
    return wanted


def error_bounds(points: Sequence[ChoicePoint]) -> dict[ChoicePoint, float]:
    """Each point's error, at most that of any point with blocks in all its layers and steps.

    More blocks come no closer to attention; that a few sampled pictures say so is chance.
    """
    return {
        point: min(
            other.error
            for other in points
            if set(other.replaced) >= set(point.replaced) and other.start <= point.start
        )
        for point in points
    }


def choose(measured: TradeOff, wanted: str | float) -> ChoicePoint:
    """The point of least error that saves what a preset of SHARES, or a share in (0, 1], asks for.

    Errors are compared by `error_bounds`; of equal ones the point that saves least is taken, as the
    one with attention in more places. Raises ValueError for another preset or share, and where
    nothing saves as much.
    """
    share, points = share_wanted(wanted), measured.points
    if wanted == FASTEST:
        return measured.front[-1]
    enough = [point for point in points if saves(point.saved, share)]
    if not enough:
        raise ValueError(
            f"Expected layers and steps that save {share:.0%} of the time, got at most "
            f"{measured.front[-1].saved:.0%}. Ask for less."
        )
    bounds = error_bounds(points)
    return min(enough, key=lambda point: (bounds[point], point.saved))
