"""The trade-off as a picture: the curve of what was measured, and samples of what it offers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageOps

from ..pictures.convert import to_pil
from ..pictures.figure import BLUE, GRAY, ORANGE, PlotsUnavailable, new_figure, rendered
from ..pictures.metrics import psnr
from ..pictures.sheet import sheet, stacked
from .choice import ChoicePoint, TradeOff

_TILE = 176
# Of a label, in shares of the axes.
_LABEL_WIDTH, _LABEL_HEIGHT = 0.22, 0.15


class Sampled(NamedTuple):
    """Pictures [B, H, W, 3] in 0…1 drawn with a named choice; `point` None: with attention."""

    name: str
    point: ChoicePoint | None
    pictures: torch.Tensor


def choice_page(
    measured: TradeOff,
    named: Mapping[str, ChoicePoint],
    chosen: str,
    sampled: Sequence[Sampled],
) -> Image.Image:
    """The curve, and below it a row of pictures per prompt; the first of `sampled` is attention's.

    Without matplotlib a line in place of the curve says so.
    """
    parts, footer = [], ""
    try:
        parts.append(rendered(choice_curve(measured, named, chosen)))
    except PlotsUnavailable:
        footer = "The curve needs: pip install matplotlib"
    if sampled:
        parts.append(_pictures(sampled))
    return stacked(parts or [Image.new("RGB", (640, 8), "white")], "", footer)


def choice_curve(measured: TradeOff, named: Mapping[str, ChoicePoint], chosen: str):
    """A matplotlib figure of all points and the front; `named` points are labeled.

    Raises PlotsUnavailable without matplotlib.
    """
    figure = new_figure(8.6, 4.8)
    axes = figure.subplots()
    best = measured.front
    saved, decibels = [100 * p.saved for p in best], [p.decibels for p in best]
    left = min(saved[0], *(100 * point.saved for point in named.values())) - 4
    height = max(decibels[0] - decibels[-1], 1.0)
    others = [p for p in measured.points if 100 * p.saved >= left and p.decibels > 0]
    axes.plot(
        [100 * p.saved for p in others],
        [p.decibels for p in others],
        ".",
        color="0.8",
        markersize=5,
        label="other layers and steps that were sampled",
    )
    axes.plot(saved, decibels, "o-", color=BLUE, markersize=4, label="the best of them")
    point = named[chosen]
    mark = {"color": ORANGE, "markersize": 10, "zorder": 4, "label": "chosen"}
    axes.plot(100 * point.saved, point.decibels, "D", **mark)
    axes.set_xlim(left, 104)
    axes.set_ylim(decibels[-1] - 0.3 * height, decibels[0] + 0.05 * height)
    axes.set_xticks([share for share in range(0, 101, 10) if share > left])
    _label(axes, named)
    axes.set_xlabel("time saved, % of what blocks in every layer and step save")
    axes.set_ylabel("−10·log10 of the error of the latents, dB\n(higher: closer to attention)")
    axes.set_title("What keeping attention in layers and first steps costs and brings", size=11)
    axes.grid(linewidth=0.4)
    axes.legend(loc="lower left", fontsize=8.5)
    return figure


def _label(axes, named: Mapping[str, ChoicePoint]) -> None:
    """Names and figures in rows above the curve, each over its point and joined to it."""
    names: dict[ChoicePoint, list[str]] = {}
    for name, point in named.items():
        names.setdefault(point, []).append(name)
    left, right = axes.get_xlim()
    low, top = axes.get_ylim()
    # Where the last label of each row ends.
    ends: list[float] = []
    for point in sorted(names, key=lambda point: point.saved):
        x, half = 100 * point.saved, _LABEL_WIDTH / 2 * (right - left)
        middle = min(max(x, left + half), right - half)
        row = next((row for row, end in enumerate(ends) if end <= middle - half), len(ends))
        ends[row : row + 1] = [middle + half]
        y = top + (0.35 + row) * _LABEL_HEIGHT * (top - low)
        text = f"{', '.join(names[point])}\n{x:.0f}% saved, {point.decibels:.1f} dB"
        # White behind it hides the grid.
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        style = {"ha": "center", "va": "bottom", "fontsize": 8.5, "zorder": 5}
        axes.text(middle, y, text, bbox=behind, **style)
        axes.plot([x, x], [point.decibels, y], ":", color=GRAY, linewidth=0.9, zorder=1)
    axes.set_ylim(low, top + (0.5 + len(ends)) * _LABEL_HEIGHT * (top - low))


def _pictures(sampled: Sequence[Sampled]) -> Image.Image:
    """A column per choice, a row per prompt, under each picture how close it is to attention's."""
    attention = sampled[0].pictures
    rows = range(len(attention))
    near = [psnr(attention, other.pictures) for other in sampled[1:]]
    return sheet(
        [[_shrunk(to_pil(entry.pictures[row])) for entry in sampled] for row in rows],
        columns=[_title(entry) for entry in sampled],
        captions=[["", *(f"PSNR {values[row]:.1f} dB" for values in near)] for row in rows],
        tile=_TILE,
        size=14,
    )


def _title(entry: Sampled) -> str:
    if entry.point is None:
        return entry.name
    return f"{entry.name}: {100 * entry.point.saved:.0f}% saved"


def _shrunk(picture: Image.Image) -> Image.Image:
    """The picture, within a square of _TILE pixels where it is larger."""
    return ImageOps.contain(picture, (_TILE, _TILE)) if max(picture.size) > _TILE else picture
