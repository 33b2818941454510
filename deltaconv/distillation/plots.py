"""Pictures of a distillation: teacher beside student, loss curve, held-out errors by time or level.

Curves need matplotlib.
"""

from collections.abc import Sequence

from PIL import Image, ImageOps

from ..pictures.figure import PlotsUnavailable, new_figure, rendered
from ..pictures.sheet import sheet, stacked
from .evaluation import Evaluation

_TILE = 160


def progress_picture(
    losses: Sequence[tuple[str, float]],
    pairs: Sequence[tuple[Image.Image, Image.Image]],
    caption: str,
) -> Image.Image:
    """Losses (stage, value) by step and pairs (teacher, student) → one picture.

    Without matplotlib a line in place of the curve says so.
    """
    row = [_shrunk(picture) for pair in pairs for picture in pair]
    parts = [sheet([row], columns=("teacher", "student") * len(pairs), tile=_TILE)]
    footer = ""
    try:
        if figure := loss_curve(losses):
            parts.append(rendered(figure))
    except PlotsUnavailable:
        footer = "The loss curve needs: pip install matplotlib"
    return stacked(parts, caption, footer, size=14)


def _shrunk(picture: Image.Image) -> Image.Image:
    """The picture, within a square of _TILE pixels where it is larger."""
    if max(picture.size) <= _TILE:
        return picture
    return ImageOps.contain(picture, (_TILE, _TILE))


def loss_curve(losses: Sequence[tuple[str, float]]):
    """Losses (stage, value) by step → figure, one line per stage; None for fewer than two."""
    finite = [(step, stage, loss) for step, (stage, loss) in enumerate(losses) if 0 < loss < 1e30]
    figure = new_figure(6.6, 2.4)
    if len(finite) < 2:
        return None
    # After new_figure, which raises PlotsUnavailable without matplotlib.
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot(yscale="log", xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    for stage in dict.fromkeys(stage for _, stage, _ in finite):
        points = [(step, loss) for step, name, loss in finite if name == stage]
        axes.plot(*zip(*points, strict=True), label=stage, linewidth=1)
    axes.legend(frameon=False)
    return figure


def error_curve(points: Sequence[tuple[str, float, float]]) -> Image.Image | None:
    """(name, seconds, held-out error) of a distillation → one named point each, on a log axis.

    None without matplotlib.
    """
    try:
        figure = new_figure(6.6, 2.8)
    except PlotsUnavailable:
        return None
    axes = figure.add_subplot(
        yscale="log", xlabel="seconds", ylabel="mse of the predicted\nnoise, held out"
    )
    names, seconds, errors = zip(*points, strict=True)
    axes.plot(seconds, errors, marker="o", linewidth=1)
    for name, second, error in zip(names, seconds, errors, strict=True):
        axes.annotate(f"{name}\n{error:.4f}", (second, error), (4, 6), textcoords="offset points")
    axes.margins(x=0.15, y=0.3)
    return rendered(figure)


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
