"""Pictures of a distillation: the loss curve (with matplotlib), and teacher beside student."""

import importlib.util
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..pictures.figure import new_figure
from .evaluation import Evaluation

_TILE = 160
_MARGIN = 8


def progress_picture(
    losses: Sequence[tuple[str, float]],
    pairs: Sequence[tuple[Image.Image, Image.Image]],
    caption: str,
) -> Image.Image:
    """Losses (stage, value) by step and pairs (teacher, student) → one picture.

    Without matplotlib a line in place of the curve says so.
    """
    curve = loss_curve(losses)
    width = max(len(pairs) * (2 * _TILE + _MARGIN) + _MARGIN, curve.width if curve else 0)
    top = 24
    height = top + _TILE + 2 * _MARGIN + (curve.height if curve else top)
    sheet = Image.new("RGB", (width, height), "white")
    text = ImageDraw.Draw(sheet)
    text.text((_MARGIN, 6), f"{caption}   (teacher | student)", "black")
    if importlib.util.find_spec("matplotlib") is None:
        text.text((_MARGIN, height - top), "The loss curve needs: pip install matplotlib", "black")
    for column, pair in enumerate(pairs):
        left = _MARGIN + column * (2 * _TILE + _MARGIN)
        for side, picture in enumerate(pair):
            tile = picture.resize((_TILE, _TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + side * _TILE, top))
    if curve:
        sheet.paste(curve, (0, top + _TILE + _MARGIN))
    return sheet


def loss_curve(losses: Sequence[tuple[str, float]]) -> Image.Image | None:
    """Losses (stage, value) by step on a log axis, one line per stage; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    finite = [(step, stage, loss) for step, (stage, loss) in enumerate(losses) if 0 < loss < 1e30]
    if len(finite) < 2:
        return None
    figure = Figure(figsize=(6.6, 2.4), dpi=100, layout="constrained")
    axes = figure.add_subplot(yscale="log", xlabel="step", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for stage in dict.fromkeys(stage for _, stage, _ in finite):
        points = [(step, loss) for step, name, loss in finite if name == stage]
        axes.plot(*zip(*points, strict=True), label=stage, linewidth=1)
    axes.legend(frameon=False)
    return _rendered(figure)


def error_curve(points: Sequence[tuple[str, float, float]]) -> Image.Image | None:
    """(name, seconds, held-out error) of a distillation → one named point each, on a log axis.

    None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.6, 2.8), dpi=100, layout="constrained")
    axes = figure.add_subplot(
        yscale="log", xlabel="seconds", ylabel="mse of the predicted\nnoise, held out"
    )
    names, seconds, errors = zip(*points, strict=True)
    axes.plot(seconds, errors, marker="o", linewidth=1)
    for name, second, error in zip(names, seconds, errors, strict=True):
        axes.annotate(f"{name}\n{error:.4f}", (second, error), (4, 6), textcoords="offset points")
    axes.margins(x=0.15, y=0.3)
    return _rendered(figure)


def level_plot(evaluation: Evaluation):
    """A matplotlib figure of the errors by noise level, every site a thin line.

    Raises PlotsUnavailable without matplotlib.
    """
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="noise level (sigma)", ylabel="relative error"
    )
    sigmas = [level.sigma for level in evaluation.levels]
    for site in evaluation.levels[0].sites:
        errors = [level.sites[site] for level in evaluation.levels]
        axes.plot(sigmas, errors, color="0.7", linewidth=0.8)
    axes.plot([], [], color="0.7", linewidth=0.8, label="each block alone")
    relative = [level.relative for level in evaluation.levels]
    axes.plot(sigmas, relative, color="tab:blue", marker="o", label="predicted noise, all blocks")
    axes.legend(frameon=False)
    return figure


def _rendered(figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
