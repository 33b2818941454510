"""The share of sampling from which on blocks act, as text of recipes and of files' metadata."""

import re
from decimal import Decimal

EXPECTED = "a start of at least 0 and below 1, such as 0.3"


def start_text(start: float) -> str:
    """A start as `read_start` reads it back exactly."""
    return format(Decimal(repr(float(start))), "f")


def read_start(text: str) -> float | None:
    """`0`, `0.3` or `.25` → the start; None for any other text, 1 and above included."""
    if not re.fullmatch(r"0|0?\.[0-9]{1,400}", text):
        return None
    start = float(text)
    return start if is_start(start) else None


def is_start(start: float) -> bool:
    """Whether blocks that act from this share of sampling on act at all."""
    return 0 <= start < 1
