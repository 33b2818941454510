"""Settings of a locality run, and parsers of the node's text inputs for them."""

import re
from dataclasses import dataclass

from .attention import GROUPS

SENSITIVITIES = ("off", "window", "block", "window and block")


@dataclass(frozen=True)
class LocalityPlan:
    """Settings of one run: times in sampling, query points, precision, changes to try.

    `queries` is None for all of them; `window` is None for each site's recommended kernel.
    """

    percents: tuple[float, ...] = (0.2, 0.5, 0.8)
    points: tuple[tuple[float, float], ...] = ((0.5, 0.5),)
    queries: int | None = None
    share: float = 0.6
    sensitivity: str = "off"
    window: int | None = None
    seed: int = 0

    def __post_init__(self):
        problems = []
        if self.queries is not None and self.queries < 2 * GROUPS:
            problems.append(f"0 (all) or at least {2 * GROUPS} queries, got {self.queries}")
        if not 0 < self.share < 1:
            problems.append(f"a field's share between 0 and 1, got {self.share}")
        if self.sensitivity not in SENSITIVITIES:
            problems.append(f"sensitivity out of {SENSITIVITIES}, got {self.sensitivity!r}")
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            problems.append(f"an odd window (or 0), got {self.window}")
        if problems:
            raise ValueError("Expected " + "; ".join(problems) + ". Correct these inputs.")


def parse_percents(text: str) -> tuple[float, ...]:
    """ "0.2, 0.5" → fractions of sampling in rising order; ValueError for anything else."""
    words = re.split(r"[\s,;]+", text.strip())
    values = _fractions(words)
    if len(values) < len(words):
        raise ValueError(
            f"Expected percents as fractions of sampling from 0 to 1 such as 0.2, 0.5, 0.8, got "
            f"{text[:80]!r}. 0 is the noisiest step, 1 the last."
        )
    return tuple(sorted(set(values)))


def parse_points(text: str) -> tuple[tuple[float, float], ...]:
    """Points "x, y", one a line or separated by ";" → fractions of the picture, from its top left.

    Raises ValueError that names the point; an empty text has no points.
    """
    points = []
    for entry in filter(str.strip, re.split(r"[;\n]", text)):
        words = re.split(r"[\s,]+", entry.strip())
        values = _fractions(words)
        if not len(words) == len(values) == 2:
            raise ValueError(
                "Expected query points as x, y with 0 to 1 from the top left, such as 0.5, 0.25, "
                f"one a line, got {entry.strip()[:80]!r}."
            )
        points.append((values[0], values[1]))
    return tuple(dict.fromkeys(points))


def query_index(point: tuple[float, float], height: int, width: int) -> int:
    """Index of the token under a point (x, y) of the picture, on a map of that size."""
    x, y = point
    return min(int(y * height), height - 1) * width + min(int(x * width), width - 1)


def _fractions(words: list[str]) -> list[float]:
    """The words that are plain decimals from 0 to 1."""
    decimals = (word for word in words if re.fullmatch(r"(?=.*[0-9])[0-9]{0,3}\.?[0-9]{0,9}", word))
    return [value for value in map(float, decimals) if 0 <= value <= 1]
