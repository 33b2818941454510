"""Matplotlib figures as pictures; a sentence in their place where matplotlib is missing."""

import textwrap
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw

from .convert import to_tensor
from .sheet import font

# From Okabe and Ito's palette, which is safe for color blindness.
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"


class PlotsUnavailable(RuntimeError):
    """matplotlib is not installed; the message says how to get it."""


def new_figure(width: float, height: float):
    """A matplotlib Figure of that size in inches, without touching pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsUnavailable(
            "Pictures need matplotlib, which is not installed here: run `python -m pip install "
            "matplotlib` with ComfyUI's Python and restart. Tables and files work without it."
        ) from error
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """`text` for a figure that shows it as it is: between two $ matplotlib reads formulas."""
    return text.replace("$", r"\$")


def rendered(figure) -> Image.Image:
    """A figure of `new_figure` → RGB."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def picture(draw: Callable[[], object], *excused: type[Exception]) -> torch.Tensor:
    """The figure that `draw` returns as a picture [1, H, W, 3].

    PlotsUnavailable and errors of the `excused` types become a picture of their message.
    """
    try:
        return to_tensor(rendered(draw()))
    except (PlotsUnavailable, *excused) as error:
        return _sentence(str(error))


def _sentence(text: str) -> torch.Tensor:
    """Text on white as a picture [1, H, W, 3], without matplotlib."""
    lines = textwrap.wrap(text, 70)
    image = Image.new("RGB", (760, 40 + 26 * len(lines)), "white")
    ImageDraw.Draw(image).multiline_text((20, 20), "\n".join(lines), "black", font(18), spacing=8)
    return to_tensor(image)
