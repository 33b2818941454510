"""Time model calls and their self-attention layers by picture size: attention against ΔConv."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from ...kernels.timing import extra_memory, once, summary
from .. import markdown
from ..memory import is_out_of_memory

LARGEST_SIDE = 16384
MOST_SIZES = 16

Size = tuple[int, int]
Taken = TypeVar("Taken")


class Contender(NamedTuple):
    """`part` is step, a call of the whole model, or layers, its replaced layers alone."""

    part: str
    way: str


PARTS, WAYS = ("step", "layers"), ("attention", "ΔConv")
CONTENDERS = tuple(Contender(part, way) for part in PARTS for way in WAYS)


@dataclass
class SizeTimes:
    """Measurements at one size in pixels: seconds, peak bytes beside the weights, and failures."""

    size: Size
    times: dict[Contender, dict[str, float]] = field(default_factory=dict)
    memory: dict[Contender, int] = field(default_factory=dict)
    problems: dict[Contender, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return "{} × {}".format(*self.size)

    def ratio(self, part: str) -> float | None:
        """Time of attention over that of ΔConv; None where one of the two has no time."""
        attention, blocks = (self.times.get(Contender(part, way)) for way in WAYS)
        return attention["median"] / blocks["median"] if attention and blocks else None

    def winner(self) -> str | None:
        """The way whose whole step is faster beyond the spread; "" for neither, None: unknown."""
        attention, blocks = (self.times.get(Contender("step", way)) for way in WAYS)
        if not attention or not blocks:
            return None
        if blocks["high"] < attention["low"]:
            return WAYS[1]
        return WAYS[0] if attention["high"] < blocks["low"] else ""


def parse_sizes(text: str) -> list[Size]:
    """ "512, 768x1024" → (width, height) in pixels, in that order and each once; "" → none.

    Raises ValueError for malformed sizes, a side above 16384, and more than 16 sizes.
    """
    sizes = []
    for entry in filter(None, map(str.strip, re.split(r"[,;\n]", text))):
        match = re.fullmatch(r"(\d+)(?:\s*[x×]\s*(\d+))?", entry, re.IGNORECASE)
        if not match:
            raise ValueError(
                f"Expected sizes in pixels such as 512, 1024 or 768x1024, got {entry!r}. Write "
                "one side of a square, or width x height, separated by commas."
            )
        size = (int(match[1]), int(match[2] or match[1]))
        if not 0 < min(size) <= max(size) <= LARGEST_SIDE:
            raise ValueError(
                f"Expected sides from 1 to {LARGEST_SIDE} pixels, got {entry!r}. Take it out."
            )
        sizes.append(size)
    sizes = list(dict.fromkeys(sizes))
    if len(sizes) > MOST_SIZES:
        raise ValueError(f"Expected at most {MOST_SIZES} sizes, got {len(sizes)}. Take some out.")
    return sizes


def latent_size(size: Size, cell: int, multiple: int = 1) -> tuple[int, int]:
    """(width, height) in pixels → latent height and width, at `cell` pixels per latent cell.

    Raises ValueError unless both are multiples of `multiple` cells.
    """
    step = cell * multiple
    if any(side % step for side in size):
        nearest = " x ".join(str(max(1, round(side / step)) * step) for side in size)
        raise ValueError(
            f"Expected sizes in multiples of {step} pixels for this model, got "
            f"{size[0]} x {size[1]}. Take {nearest}."
        )
    return size[1] // cell, size[0] // cell


def measure(
    result: SizeTimes,
    calls: Mapping[Contender, Callable[[], torch.Tensor]],
    device: torch.device,
    repeats: int,
    seconds: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SizeTimes:
    """Fill `result`: every call once to warm up, then `repeats` rounds in which all take turns.

    The first round always runs; no other starts after `seconds`, and a call that takes longer than
    that by itself is not repeated. A call that runs out of memory is dropped, the others go on.
    `progress(done, total)` is called after every call and may raise to stop.
    """
    samples: dict[Contender, list[float]] = {}
    waiting = list(calls)
    total = len(calls) * (1 + repeats)
    done = 0

    def attempt(name: Contender, take: Callable[[], Taken]) -> Taken | None:
        try:
            return take()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            result.problems[name] = "out of memory"
        # After the except block: its traceback keeps the failed call's tensors alive.
        waiting.remove(name)
        samples.pop(name, None)
        if device.type != "cpu":
            getattr(torch, device.type).empty_cache()
        return None

    for name, call in calls.items():
        first = attempt(name, lambda call=call: once(call, device))
        if first is not None and first > seconds:
            samples[name] = [first]
            waiting.remove(name)
        elif first is not None and name.part == "step" and device.type == "cuda":
            used = attempt(name, lambda call=call: extra_memory(call, device))
            if used is not None:
                result.memory[name] = used
        done += 1
        progress(done, total)
    deadline = time.monotonic() + seconds
    for turn in range(repeats):
        if turn and time.monotonic() > deadline:
            break
        for name in tuple(waiting):
            taken = attempt(name, lambda name=name: once(calls[name], device))
            if taken is not None:
                samples.setdefault(name, []).append(taken)
            done += 1
            progress(done, total)
    result.times |= {name: summary(taken) for name, taken in samples.items()}
    return result


def table(results: Sequence[SizeTimes]) -> str:
    """Results → a table in Markdown, its legend, and the sizes at which each way is faster."""
    columns = ["size", *(f"{c.part}, {c.way}" for c in CONTENDERS)]
    columns.insert(3, "faster")
    columns.append("faster")
    memory = any(result.memory for result in results)
    if memory:
        columns += [f"memory, {way}" for way in WAYS]
    rows = [columns]
    for result in results:
        row = [result.title]
        for part in PARTS:
            row += [_cell(result, Contender(part, way)) for way in WAYS]
            ratio = result.ratio(part)
            row.append(f"{ratio:.2f}×" if ratio else "–")
        if memory:
            row += [_bytes(result.memory.get(Contender("step", way))) for way in WAYS]
        rows.append(row)
    parts = [
        markdown.table(rows),
        "Milliseconds per call: the median and, in brackets, the middle half. step: the whole "
        "model; layers: the replaced self-attention layers alone; faster: how many times as fast "
        "ΔConv is.",
    ]
    if memory:
        parts.append("Memory: what a step takes at its peak beside weights and result.")
    return "\n\n".join([*parts, *_verdict(results)])


def _cell(result: SizeTimes, name: Contender) -> str:
    timing = result.times.get(name)
    if timing is None:
        return result.problems.get(name, "–")
    low, middle, high = (f"{timing[key] * 1e3:.4g}" for key in ("low", "median", "high"))
    return f"{middle} ({low}–{high})" if timing["samples"] > 1 else f"{middle} (one call)"


def _bytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.0f} MiB"


def _verdict(results: Sequence[SizeTimes]) -> list[str]:
    attention, blocks = WAYS
    said = {
        blocks: "The whole step is faster with ΔConv at {}.",
        attention: "The whole step is faster with attention at {}: choose “where faster” in Apply "
        "ΔConv to keep it there.",
        "": "The two differ by less than the spread at {}.",
    }
    found = {way: [r.title for r in results if r.winner() == way] for way in said}
    return [said[way].format(", ".join(titles)) for way, titles in found.items() if titles]


def plot(results: Sequence[SizeTimes], title: str):
    """A matplotlib figure: time per call against size, both axes logarithmic, with the spread.

    Raises ValueError where nothing was measured.
    """
    from ..pictures.figure import BLUE, ORANGE, new_figure, plain

    if not any(result.times for result in results):
        raise ValueError("Nothing could be timed, so there is nothing to draw; the table says why.")
    figure = new_figure(7.2, 4.8)
    from matplotlib.ticker import LogLocator, NullLocator

    axes = figure.add_subplot(xscale="log", yscale="log")
    colors = dict(zip(WAYS, (ORANGE, BLUE), strict=True))
    names = {"step": "whole step, {}", "layers": "self-attention layers alone, {}"}
    by_area = sorted(results, key=lambda result: result.size[0] * result.size[1])
    for name in CONTENDERS:
        timed = [result for result in by_area if name in result.times]
        if not timed:
            continue
        sides = [(r.size[0] * r.size[1]) ** 0.5 for r in timed]
        low, middle, high = (
            [1e3 * r.times[name][key] for r in timed] for key in ("low", "median", "high")
        )
        spread = [
            [m - value for m, value in zip(middle, low, strict=True)],
            [value - m for m, value in zip(middle, high, strict=True)],
        ]
        axes.errorbar(
            sides,
            middle,
            spread,
            marker="o",
            capsize=3,
            color=colors[name.way],
            linestyle="-" if name.part == "step" else "--",
            label=names[name.part].format(name.way),
        )
    sides = sorted({(r.size[0] * r.size[1]) ** 0.5 for r in by_area})
    axes.set_xticks(sides, [f"{side:.0f}²" for side in sides])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="pixels", ylabel="milliseconds per call")
    axes.set_title(plain(title), fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    return figure
