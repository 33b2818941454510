"""A choice of layers and steps in words: what it keeps, why, what that saves and costs."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..geometry import BlockPlan
from ..locality.recipe import Recipe
from ..locality.report import site_label
from ..markdown import bullets, table
from .choice import ChoicePoint, TradeOff


@dataclass(frozen=True)
class ChoiceFacts:
    """Inputs of the report: the trade-off, its named points, which is chosen, how it was measured.

    `sites` are all of the model's in network order, with or without a block. `counted` says how
    costs were taken, `sampled` what the error was measured on.
    """

    measured: TradeOff
    named: Mapping[str, ChoicePoint]
    chosen: str
    sites: tuple[str, ...]
    counted: str
    sampled: str

    @property
    def point(self) -> ChoicePoint:
        return self.named[self.chosen]


def choice_report(facts: ChoiceFacts) -> str:
    """Facts → Markdown: the choice, the other ones, and a line per layer."""
    point = facts.point
    said = [
        f"{facts.chosen}: blocks in {len(point.replaced)} of {len(facts.sites)} self-attention "
        f"layers, {_from(point.start)}; attention everywhere else",
        _time(facts),
        f"error {point.decibels:.1f} dB (−10·log10 of the latents' squared error over their "
        f"power), sampled with {facts.sampled}",
        f"attention stays in: {_kept(facts)}",
    ]
    rows = [("choice", "saved", "from", "layers", "error")]
    rows += [
        (
            name,
            f"{point.saved:.1%}",
            f"{point.start:.0%}",
            str(len(point.replaced)),
            f"{point.decibels:.1f} dB",
        )
        for name, point in facts.named.items()
    ]
    parts = [
        bullets(said),
        table(rows),
        "Layer by layer; brought: by attention there alone, estimated, mean over the starts:",
        bullets(f"{site}: {why}" for site, why in choice_notes(facts).items()),
        f"{facts.measured.measurements} sets of layers were measured along the model's own "
        f"sampling, {len(facts.measured.points)} choices sampled to the end; the errors are of "
        "these prompts and this seed, others differ.",
    ]
    return "\n\n".join(parts)


def choice_recipe(facts: ChoiceFacts, plans: Mapping[str, BlockPlan]) -> Recipe:
    """The choice as a recipe for a distillation: these layers by their plans, all others kept."""
    point = facts.point
    return Recipe(
        {site: plans[site] if site in point.replaced else None for site in facts.sites},
        f"{facts.chosen}: saves {point.saved:.0%} of what blocks in every layer and step save, at "
        f"{point.decibels:.1f} dB",
        choice_notes(facts),
        point.start,
    )


def choice_notes(facts: ChoiceFacts) -> dict[str, str]:
    """Site → whether it gets its block, and the figures that speak for or against it."""
    return {site: _note(facts, site) for site in facts.sites}


def _note(facts: ChoiceFacts, site: str) -> str:
    measured = facts.measured
    if site not in measured.costs:
        return "attention, the weights have no block"
    cost = measured.costs[site]
    way = "block" if site in facts.point.replaced else "attention"
    costs = f"{_amount(cost.attention, cost.timed)} → {_amount(cost.block, cost.timed)}"
    if not cost.saved:
        return f"{way}, {costs}: the block saves nothing"
    share = cost.saved / measured.total
    brought = "brought was not tried: without it too little is saved"
    if site in measured.alone:
        brought = f"brought {measured.alone[site]:+.2f} dB"
    return f"{way}, {costs}, {share:.1%} of all that is saved; {brought}"


def _time(facts: ChoiceFacts) -> str:
    point, total = facts.point, facts.measured.total
    timed = next(iter(facts.measured.costs.values())).timed
    return (
        f"saves {point.saved:.1%} of what blocks in every layer and step save: "
        f"{_amount(point.saved * total, timed)} of {_amount(total, timed)} per step on average, "
        f"{facts.counted}"
    )


def _kept(facts: ChoiceFacts) -> str:
    kept = [site_label(site) for site in facts.sites if site not in facts.point.replaced]
    return ", ".join(kept) or "no layer"


def _from(start: float) -> str:
    return f"from {start:.0%} of sampling on" if start else "in every step"


def _amount(value: float, timed: bool) -> str:
    if not timed:
        return f"{value / 1e9:.3g} GFLOP"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
