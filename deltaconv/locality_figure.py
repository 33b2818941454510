"""Figures of matplotlib, an optional extra of the pack, as pictures ComfyUI can show."""

import torch

# Okabe and Ito's colours, told apart under every common colour blindness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"


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


def to_image(figure) -> torch.Tensor:
    """A figure → picture [1, H, W, 3] in 0…1."""
    figure.canvas.draw()
    pixels = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = figure.canvas.get_width_height()
    return pixels.view(1, height, width, 4)[..., :3].float() / 255
