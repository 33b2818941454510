"""Recipes: which self-attention layers to replace by which ΔConvBlock, as text and as presets."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from ..families import FAMILIES, family_title
from ..flops import attention_flops, block_flops
from ..geometry import BlockPlan
from ..start import EXPECTED, is_start, read_start, start_text
from .report import KERNELS, LocalityReport, SiteLocality

PRESETS = ("measured", "published", "budget")
# Largest error at which a layer that looks by picture is replaced.
TOLERATED_ERROR = 0.01
_START = "start"


class RecipeError(ValueError):
    """A recipe cannot be read; the message names the line and the reason."""


@dataclass(frozen=True)
class Recipe:
    """Site path → its block, None where attention stays, in network order.

    `notes` say per site why, `about` what the recipe comes from. Blocks act from `start` on, a
    share of sampling.
    """

    blocks: Mapping[str, BlockPlan | None]
    about: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    start: float = 0.0

    def __post_init__(self):
        if not is_start(self.start):
            raise RecipeError(f"Expected {EXPECTED}, got {self.start}. Blocks would never act.")

    @property
    def replaced(self) -> dict[str, BlockPlan]:
        """The sites that get a block."""
        return {path: block for path, block in self.blocks.items() if block}

    def to_text(self) -> str:
        """One line per site, and one for a start, which `parse_recipe` reads back."""
        lines = [f"# {line}" for line in self.about.splitlines()]
        if self.start:
            lines.append(f"{_START}: {start_text(self.start)}")
        for path, block in self.blocks.items():
            what = "keep"
            if block:
                scales = ",".join(map(_scale_text, block.scales))
                what = f"replace kernel={block.kernel} scales={scales}"
                what += f" heads={block.heads}" if block.heads else ""
            note = self.notes.get(path)
            lines.append(f"{path}: {what}" + (f"  # {note}" if note else ""))
        return "\n".join(lines) + "\n"


def parse_recipe(text: str, sites: Collection[str] | None = None) -> Recipe:
    """Text of lines `path: keep` or `path: replace kernel=9 scales=1,1/2` → Recipe.

    `heads=8` behind gives the block an attention over pooled tokens, with the layer's own heads.

    A line `start: 0.3` says from where in sampling blocks act; no site can be called start. `#`
    begins a comment. If `sites` are given, those that the text does not name are kept. Raises
    RecipeError with line and reason, also for other paths than these.
    """
    blocks: dict[str, BlockPlan | None] = {}
    notes, lines_of = {}, {}
    start = 0.0
    for number, line in enumerate(text.splitlines(), start=1):
        content, _, note = line.partition("#")
        if not content.strip():
            continue
        path, colon, rest = (part.strip() for part in content.partition(":"))
        if not colon:
            raise _refuse(number, "`site: keep` or `site: replace kernel=… scales=…`", line.strip())
        if path in lines_of:
            raise _refuse(number, f"each site once, first in line {lines_of[path]}", path)
        lines_of[path] = number
        if path == _START:
            start = _start(number, rest)
            continue
        if sites is not None and path not in sites:
            raise _refuse(number, f"one of the {len(sites)} sites of this model", path)
        blocks[path] = _block(number, rest)
        if note.strip():
            notes[path] = note.strip()
    if sites is not None:
        blocks = {path: blocks.get(path) for path in sites}
    if not blocks:
        raise RecipeError("Expected a recipe with at least one line `site: …`, got none.")
    about = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    return Recipe(blocks, "\n".join(about), notes, start)


def make_recipe(report: LocalityReport, preset: str, computation: float) -> Recipe:
    """The recipe of one of PRESETS; `computation` is the target of `budget`, else unused."""
    if preset == "budget":
        return budget_recipe(report, computation)
    return {"measured": measured_recipe, "published": published_recipe}[preset](report)


def measured_recipe(report: LocalityReport) -> Recipe:
    """Every site with its receptive field's kernel; what looks by picture only if that is cheap."""
    blocks: dict[str, BlockPlan | None] = {}
    notes = {}
    for path, site in report.sites.items():
        error, block = site.sensitivity.error, BlockPlan(site.kernel(report.share))
        blocks[path] = block
        if site.kind != "content":
            field = site.field(report.share)
            notes[path] = "no field: a constant" if field is None else f"field {field}×{field}"
        elif error is None:
            blocks[path] = None
            notes[path] = "looks by picture, and its sensitivity was not measured"
        else:
            blocks[path] = block if error <= TOLERATED_ERROR else None
            limit = "at most" if error <= TOLERATED_ERROR else "above"
            notes[path] = (
                f"looks by picture; alone it costs {100 * error:.2g}%, {limit} "
                f"{100 * TOLERATED_ERROR:.2g}%"
            )
    return Recipe(blocks, f"measured: kernels from the receptive field; {_about(report)}", notes)


def published_recipe(report: LocalityReport) -> Recipe:
    """The kernels that the method's authors ship for this family."""
    family = FAMILIES.get(report.family)
    if family is None or not family.kernels:
        known = ", ".join(f.title for f in FAMILIES.values() if f.kernels)
        raise ValueError(
            f"Expected a family the authors ship kernels for ({known}), got "
            f"{family_title(report.family)}. Use the preset measured or budget."
        )
    kernels = {path: family.published_kernel(path) for path in report.sites}
    blocks = {path: BlockPlan(kernel) if kernel else None for path, kernel in kernels.items()}
    return Recipe(blocks, f"published: the authors' kernels for {family.title}")


@dataclass(frozen=True)
class CostPoint:
    """After replacing `replaced` sites: computation over stock's, and the sum of their errors."""

    replaced: tuple[str, ...]
    computation: float
    error: float


def sensitivities(report: LocalityReport) -> dict[str, float]:
    """Site path → error of replacing it alone; ValueError where one was not measured."""
    errors = {
        path: error
        for path, site in report.sites.items()
        if (error := site.sensitivity.error) is not None
    }
    if missing := len(report.sites) - len(errors):
        raise ValueError(
            f"Expected the sensitivity of every layer, got none for {missing} of "
            f"{len(report.sites)}. Measure again with sensitivity switched on."
        )
    return errors


def cost_curve(report: LocalityReport) -> list[CostPoint]:
    """Sites replaced one by one, the least sensitive first: computation against error.

    Computation is all self-attention and blocks together over all self-attention, by formula.
    Errors were measured one site at a time and are added up, as if sites did not interact.
    Raises ValueError where sensitivity was not measured.
    """
    errors = sensitivities(report)
    stock = {path: _attention(site) for path, site in report.sites.items()}
    total = running = sum(stock.values())
    points = [CostPoint((), 1.0, 0.0)]
    for path in sorted(errors, key=lambda path: errors[path]):
        site = report.sites[path]
        running += _flops(site, BlockPlan(site.kernel(report.share))) - stock[path]
        replaced = (*points[-1].replaced, path)
        points.append(CostPoint(replaced, running / total, points[-1].error + errors[path]))
    return points


def budget_recipe(report: LocalityReport, computation: float) -> Recipe:
    """The least sensitive sites first, until computation is at most this fraction of stock's."""
    curve = cost_curve(report)
    least = min(point.computation for point in curve)
    reached = next((p for p in curve if p.computation <= computation), None)
    if reached is None:
        raise ValueError(
            f"Expected a computation target this model can reach, got {computation:.3g}; with "
            f"every layer replaced it is {least:.3g} of stock's. Ask for {least:.3g} or more."
        )
    blocks = {
        path: BlockPlan(site.kernel(report.share)) if path in reached.replaced else None
        for path, site in report.sites.items()
    }
    notes = {
        path: f"alone it costs {100 * error:.2g}%" for path, error in sensitivities(report).items()
    }
    about = (
        f"budget: {reached.computation:.3g} of the self-attention's computation, summed error "
        f"{100 * reached.error:.2g}%; {_about(report)}"
    )
    return Recipe(blocks, about, notes)


def recipe_computation(report: LocalityReport, recipe: Recipe) -> float:
    """Computation of all self-attention and blocks under this recipe over stock's, by formula."""
    stock = sum(map(_attention, report.sites.values()))
    replaced = recipe.replaced
    after = sum(
        _flops(site, replaced[path]) if path in replaced else _attention(site)
        for path, site in report.sites.items()
    )
    return after / stock


def _start(number: int, text: str) -> float:
    if (start := read_start(text)) is None:
        raise _refuse(number, EXPECTED, text)
    return start


def _block(number: int, text: str) -> BlockPlan | None:
    word, *settings = text.split() or [""]
    if word == "keep" and not settings:
        return None
    if word != "replace":
        raise _refuse(number, "keep, or replace with kernel=, scales= and heads=", text)
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if name not in ("kernel", "scales", "heads") or not equals or name in values:
            expected = "kernel=, scales= and heads= once each, without spaces inside"
            raise _refuse(number, expected, setting)
        values[name] = value
    if "kernel" not in values:
        raise _refuse(number, "replace with kernel=", text)
    kernel = values["kernel"]
    if not re.fullmatch(r"[0-9]{1,3}", kernel) or int(kernel) not in KERNELS:
        raise _refuse(number, f"an odd kernel from {KERNELS[0]} to {KERNELS[-1]}", kernel)
    scales = BlockPlan.scales
    if "scales" in values:
        scales = tuple(_scale(number, part) for part in values["scales"].split(","))
        if len(set(scales)) < len(scales):
            raise _refuse(number, "scales that differ", values["scales"])
    heads = values.get("heads", "0")
    if not re.fullmatch(r"[0-9]{1,3}", heads):
        raise _refuse(number, "a number of heads, 0 for no pooled tokens", heads)
    return BlockPlan(int(kernel), scales, heads=int(heads))


def _scale_text(scale: float) -> str:
    """What `_scale` reads as the same number: a fraction where it is one of short numbers."""
    fraction = Fraction(scale).limit_denominator(9999)
    return str(fraction) if float(fraction) == scale else f"{scale:.9f}".rstrip("0")


def _scale(number: int, text: str) -> float:
    if re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,9}|/[0-9]{1,4})?", text):
        numerator, _, denominator = text.partition("/")
        value = float(numerator) / (float(denominator or 1) or float("nan"))
        if 0 < value <= 1:
            return value
    raise _refuse(number, "scales such as 1,1/2 (fractions above 0, at most 1)", text)


def _refuse(number: int, expected: str, got: str) -> RecipeError:
    return RecipeError(f"Line {number}: expected {expected}, got {got[:120]!r}. Correct that line.")


def _about(report: LocalityReport) -> str:
    height, width = report.latent
    return f"{family_title(report.family)}, measured at latent {width} × {height}"


def _attention(site: SiteLocality) -> int:
    return attention_flops(site.dim, site.height, site.width)


def _flops(site: SiteLocality, block: BlockPlan) -> int:
    return block_flops(block.geometry(site.dim), block.scales, site.height, site.width)
