"""`python dev.py artwork`: draw the pack's icon and banner for the registry.

Dots are keys, drawn as large as one query in their middle looks at them: the published fit
a/(d² + c) + b, local plus a constant. Under the triangle the near ones are a convolution's kernel.
"""

import argparse
import math
from pathlib import Path

from . import ROOT

FOLDER = ROOT / "docs"
# Pixels. The registry takes squares of at most 400, and banners of 21:9.
ICON, BANNER = (400, 400), (1680, 720)

_GROUND, _FAR, _NEAR, _LINE = "#101820", "#2f6f7d", "#2ec4a0", "#f4a340"
_WORDS, _QUIET = "#f2f5f4", "#8fa3a8"
_CONSTANT, _WIDTH = 0.10, 1.6


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="dev.py artwork", description=__doc__).parse_args(argv)
    for path in draw(FOLDER):
        print(path)
    return 0


def draw(folder: Path) -> list[Path]:
    """Write icon.png and banner.png into `folder`; returns their paths."""
    icon, banner = folder / "icon.png", folder / "banner.png"
    figure, axes = _sheet(ICON)
    _draw(axes, (200, 200), cells=11, step=34, line=16)
    _write(figure, icon)

    figure, axes = _sheet(BANNER)
    _draw(axes, (400, 360), cells=13, step=46, line=24)
    axes.text(770, 440, "ΔConvFusion", size=104, weight="bold", color=_WORDS, va="center")
    line = "convolutions in place of self-attention"
    axes.text(776, 320, line, size=42, color=_NEAR, va="center")
    line = "SD · SDXL · PixArt · Anima, for ComfyUI"
    axes.text(776, 246, line, size=34, color=_QUIET, va="center")
    _write(figure, banner)
    return [icon, banner]


def _sheet(size: tuple[int, int]):
    """A figure of that many pixels, and axes in pixels from its lower left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, facecolor=_GROUND)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, size[0]), ylim=(0, size[1]))
    axes.axis("off")
    return figure, axes


def _draw(axes, center: tuple[float, float], cells: int, step: float, line: float) -> None:
    """`cells`² dots around `center`, their query one row below it, and a triangle `line` wide."""
    from matplotlib.patches import Circle, Polygon

    x, y = center
    half = 0.44 * cells * step
    corners = [(x, y + half), (x + half, y - 0.82 * half), (x - half, y - 0.82 * half)]
    middle = cells // 2
    for row in range(-middle, middle + 1):
        for column in range(-middle, middle + 1):
            squared = column**2 + (row + 1) ** 2
            weight = (1 - _CONSTANT) * _WIDTH**2 / (squared + _WIDTH**2) + _CONSTANT
            place, radius = (x + column * step, y + row * step), 0.45 * step * weight**0.5
            # A dot that would touch the line is left out.
            if _distance(place, corners) > radius + 0.7 * line:
                color = _NEAR if squared <= 2 else _FAR
                axes.add_patch(Circle(place, radius, color=color, linewidth=0))
    options = {"fill": False, "edgecolor": _LINE, "joinstyle": "round", "linewidth": line}
    axes.add_patch(Polygon(corners, closed=True, **options))


def _distance(point, corners) -> float:
    """From a point to the nearest side of the polygon."""
    found = []
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        along = ((point[0] - ax) * (bx - ax) + (point[1] - ay) * (by - ay)) / (
            (bx - ax) ** 2 + (by - ay) ** 2
        )
        share = min(1.0, max(0.0, along))
        found.append(
            math.hypot(point[0] - ax - share * (bx - ax), point[1] - ay - share * (by - ay))
        )
    return min(found)


def _write(figure, path: Path) -> None:
    """With a palette, which such a drawing needs no more than."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
