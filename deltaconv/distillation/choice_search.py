"""Search the layers and steps in which blocks act for what loses least by the time it saves.

A set of layers is measured along the teacher's own path, once for all starts: each step's share of
the error (`measure`). These shares alone underrate the first steps, where a picture is decided: an
error made there grows until the end. How much is learned from samplings with blocks in all layers
from every start, and what the search then proposes is sampled to the end before anything is chosen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .choice import (
    LEAST_SAVED,
    SHARES,
    ChoicePoint,
    SiteCost,
    TradeOff,
    pareto,
    saves,
    share_saved,
    total_saved,
)
from .measure import GuidedPath
from .teacher import Teacher, in_place_of_attention

# Layers are given their attention back in about this many rounds, or one by one.
_ROUNDS = 10
# Starts that are tried, and shares of the time that proposals are made for.
_STARTS, _PROPOSALS = 10, 15
# Share of the time that layers must save, together, to be measured in a quick search.
_NEGLIGIBLE = 0.02
# Below this an error is rounding.
_LEAST_ERROR = 1e-12

Block = Callable[[torch.Tensor], torch.Tensor]


def trade_off(
    path: GuidedPath,
    teacher: Teacher,
    blocks: Mapping[str, Block],
    costs: Mapping[str, SiteCost],
    *,
    wanted: float = LEAST_SAVED,
    earliest: float = 0.0,
    quick: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TradeOff:
    """Sample blocks in all layers that they make faster, and in ever fewer, from every start.

    What saves less than `wanted` and every preset is not tried. Attention comes back where that
    lowers the error most for the time it takes, in rounds that measure again the layers which
    promise most: with L layers at most 3 L + 12 sets along the path, beside the samplings, of which
    there are at most 30. Blocks act from `earliest` or later. `progress` hears (done, most). Raises
    ValueError where costs are missing, no block is faster, or no step begins after `earliest`.

    `quick` takes a third of the time: attention stays, unmeasured, in the layers that together save
    less than a fiftieth, layers are not measured again as others get theirs back, blocks in all
    layers are sampled from every other start, and of the rest what is best from each start for the
    share that is `wanted`.
    """
    replaced = _faster(blocks, costs)
    least = min(wanted, LEAST_SAVED) if wanted else LEAST_SAVED
    search = _Search(path, teacher, blocks, costs, least, _starts(path, earliest), progress)
    search.learn_growth(replaced, stride=2 if quick else 1)
    if quick:
        replaced = _worth_it(replaced, costs)
        search.errors(replaced)
    gains = {site: search.gain(replaced, site) for site in search.removable(replaced)}
    alone = {site: gain * costs[site].saved for site, gain in gains.items()}
    chunk = max(1, len(replaced) // _ROUNDS)
    while removable := search.removable(replaced):
        likely = sorted(removable, key=lambda site: -gains[site])[: 2 * chunk]
        if not quick:
            gains |= {site: search.gain(replaced, site) for site in likely}
        for site in sorted(likely, key=lambda site: -gains[site])[:chunk]:
            if site in search.removable(replaced):
                replaced = _without(replaced, site)
        search.errors(replaced)
    if quick:
        search.sample_each_start(wanted)
    else:
        search.sample_proposals([*search.even_shares, *SHARES.values(), wanted])
    progress(search.most, search.most)
    return TradeOff(search.latents, dict(costs), alone, search.growth, len(search.measured))


@dataclass
class _Search:
    """Sets of layers measured so far, and points sampled; `starts` are steps of the path."""

    path: GuidedPath
    teacher: Teacher
    blocks: Mapping[str, Block]
    costs: Mapping[str, SiteCost]
    least: float
    starts: Sequence[int]
    progress: Callable[[int, int], None]

    def __post_init__(self):
        # Set → error of blocks that act between each start and the next.
        self.measured: dict[tuple[str, ...], list[float]] = {}
        self.latents: dict[ChoicePoint, torch.Tensor] = {}
        self.growth = [1.0] * len(self.starts)
        layers = sum(cost.saved > 0 for cost in self.costs.values())
        self.most = 3 * layers + _ROUNDS + 2 + len(self.starts) + _PROPOSALS + len(SHARES)

    def learn_growth(self, replaced: tuple[str, ...], stride: int) -> None:
        """Sample with these layers from starts, and compare with the errors along the path."""
        errors = self.errors(replaced)
        shares = [sum(errors[at : at + stride]) for at in range(0, len(errors), stride)]
        ends = [self.sampled(replaced, start).error for start in self.starts[::stride]] + [0.0]
        made = [here - later for here, later in pairwise(ends)]
        growth = falling_ratios(made, shares)
        self.growth = [growth[at // stride] for at in range(len(errors))]

    def errors(self, replaced: tuple[str, ...]) -> list[float]:
        """Measure a set along the path, once: its error between each start and the next."""
        if replaced not in self.measured:
            errors = self.path.errors(self.teacher, self._visit(replaced))
            ends = [*self.starts[1:], len(errors)]
            self.measured[replaced] = [
                sum(errors[start:end]) for start, end in zip(self.starts, ends, strict=True)
            ]
            self._progress()
        return self.measured[replaced]

    def estimates(self, replaced: tuple[str, ...]) -> list[float]:
        """The error at the end by start: what is made in each part, times how it grows."""
        made = [g * e for g, e in zip(self.growth, self.errors(replaced), strict=True)]
        return [max(sum(made[index:]), _LEAST_ERROR) for index in range(len(made))]

    def removable(self, replaced: tuple[str, ...]) -> list[str]:
        """Layers without which the others still save enough."""
        return [
            site
            for site in replaced
            if len(replaced) > 1
            and saves(self._saved(_without(replaced, site), self.starts[0]), self.least)
        ]

    def gain(self, replaced: tuple[str, ...], site: str) -> float:
        """Decibels that attention in this layer brings per time, mean over what saves enough."""
        before, after = self.estimates(replaced), self.estimates(_without(replaced, site))
        ratios = [
            error / less
            for start, error, less in zip(self.starts, before, after, strict=True)
            if saves(self._saved(replaced, start), self.least)
        ]
        return 10 * sum(map(math.log10, ratios)) / len(ratios) / self.costs[site].saved

    def sampled(self, replaced: tuple[str, ...], start: int) -> ChoicePoint:
        """Sample to the end with blocks from that step on → the point, its latents kept."""
        latents = self.path.sampled(self.teacher, self._visit(replaced), start)
        expected = self.path.latents
        error = (latents - expected).square().mean() / expected.square().mean().clamp_min(1e-12)
        saved = self._saved(replaced, start)
        point = ChoicePoint(replaced, self.path.positions[start], saved, float(error))
        self.latents[point] = latents.cpu()
        self._progress()
        return point

    @property
    def even_shares(self) -> list[float]:
        """Shares of the time, evenly spaced from the least."""
        return [self.least + (1 - self.least) * k / _PROPOSALS for k in range(_PROPOSALS)]

    def sample_proposals(self, shares: Sequence[float]) -> None:
        """Sample what is estimated to be best at these shares of the time."""
        estimated = self._estimated()
        front = pareto(list(estimated))
        for share in shares:
            best = next((p for p in front if saves(p.saved, max(share, self.least))), None)
            self._sample_once(best, estimated)

    def sample_each_start(self, share: float) -> None:
        """Sample what is estimated to be best from each start at this share of the time.

        Growth is learned from blocks in all layers; how few of them fare in the first steps, a
        sampling tells.
        """
        estimated = self._estimated()
        for start in self.starts:
            enough = [
                point
                for point, step in estimated.items()
                if step == start and saves(point.saved, max(share, self.least))
            ]
            self._sample_once(min(enough, key=lambda p: p.error, default=None), estimated)

    def _estimated(self) -> dict[ChoicePoint, int]:
        """Every measured set from every start with its estimated error → the step of the start."""
        return {
            ChoicePoint(
                replaced, self.path.positions[start], self._saved(replaced, start), error
            ): start
            for replaced in self.measured
            for start, error in zip(self.starts, self.estimates(replaced), strict=True)
        }

    def _sample_once(self, point: ChoicePoint | None, estimated: Mapping[ChoicePoint, int]) -> None:
        known = {(sampled.replaced, sampled.start) for sampled in self.latents}
        if point and (point.replaced, point.start) not in known:
            self.sampled(point.replaced, estimated[point])

    def _saved(self, replaced: tuple[str, ...], start: int) -> float:
        return share_saved(self.costs, replaced, self.path.positions[start])

    def _visit(self, replaced: tuple[str, ...]):
        return in_place_of_attention({site: self.blocks[site] for site in replaced})

    def _progress(self) -> None:
        self.progress(min(len(self.measured) + len(self.latents), self.most), self.most)


def falling_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Least-squares ratios that never rise, denominators as weights: neighbors that do are pooled.

    Never below 0; denominators are at least 0.
    """
    # Of each pool: numerator, denominator, members.
    pools: list[tuple[float, float, int]] = []
    for top, bottom in zip(numerators, denominators, strict=True):
        pools.append((top, max(bottom, _LEAST_ERROR), 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] < pools[-1][0] / pools[-1][1]:
            last, before = pools.pop(), pools.pop()
            pools.append((before[0] + last[0], before[1] + last[1], before[2] + last[2]))
    return [max(0.0, top / bottom) for top, bottom, count in pools for _ in range(count)]


def _starts(path: GuidedPath, earliest: float) -> list[int]:
    """At most _STARTS steps, evenly spaced, of those that begin at `earliest` or later."""
    steps = [step for step, position in enumerate(path.positions) if position >= earliest]
    if not steps:
        raise ValueError(
            f"Expected a step that begins at {earliest:.0%} of sampling or later, where the blocks "
            f"begin to act, got {len(path.points)} steps. Take more."
        )
    count = min(_STARTS, len(steps))
    return [steps[index * len(steps) // count] for index in range(count)]


def _faster(blocks: Mapping[str, Block], costs: Mapping[str, SiteCost]) -> tuple[str, ...]:
    """The layers whose block is faster; ValueError where there is none, or costs are no costs."""
    finite = all(math.isfinite(cost.attention + cost.block) for cost in costs.values())
    if costs.keys() != blocks.keys() or not finite:
        raise ValueError(
            f"Expected the finite cost of each of {len(blocks)} blocks, got {dict(costs)}. Count "
            "them by formula where they cannot be timed."
        )
    if len({cost.timed for cost in costs.values()}) > 1:
        raise ValueError("Expected costs in one unit, got seconds and FLOPs. Take one of them.")
    faster = tuple(site for site in blocks if costs[site].saved > 0)
    if not faster:
        raise ValueError(
            f"Expected blocks that are faster than attention, got none in {len(blocks)} layers at "
            "this size on this device. Draw larger pictures, or leave attention in place."
        )
    return faster


def _worth_it(sites: tuple[str, ...], costs: Mapping[str, SiteCost]) -> tuple[str, ...]:
    """The sites but for those that save least, less than `_NEGLIGIBLE` of all in all."""
    left = _NEGLIGIBLE * total_saved(costs)
    for site in sorted(sites, key=lambda site: costs[site].saved):
        left -= costs[site].saved
        if left < 0:
            break
        sites = _without(sites, site)
    return sites


def _without(sites: tuple[str, ...], site: str) -> tuple[str, ...]:
    return tuple(other for other in sites if other != site)
