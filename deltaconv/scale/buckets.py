"""Aspect-ratio buckets: sizes of about one area, so that pictures are cut little."""

import math
from itertools import count

# The longer side over the shorter one.
_MOST_ELONGATED = 2.0


def buckets(size: int, step: int) -> list[tuple[int, int]]:
    """(width, height) of at most size² pixels, sides multiples of `step`, the square first.

    For every width the largest height that fits, up to sides of 2 : 1.
    """
    area = size * size
    found = [(size, size)]
    for units in count(1):
        width = units * step
        height = area // width // step * step
        if height < step:
            break
        if max(width, height) / min(width, height) <= _MOST_ELONGATED:
            found.append((width, height))
    return list(dict.fromkeys(found))


def nearest(width: int, height: int, among: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest to that of width × height; the first of equals."""
    ratio = math.log(width / height)
    return min(among, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - ratio))
