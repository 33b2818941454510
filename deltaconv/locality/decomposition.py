"""Fit of attention by distance, as published: a part that decays with distance, and a constant."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# With less mass than this above the constant part, a layer has no receptive field.
LEAST_LOCAL = 0.02
# Least share of the profile's variance that a curve must explain for its field to be used.
LEAST_R2 = 0.25
# Narrowest and widest radius √c, where the local part has halved, in cells and in sides of the
# map: what has not halved within a quarter of the map is not local.
_NARROWEST = 0.03
_WIDEST = 0.25
# How pydantic reads a report's parts: a number is no text, and finite.
STRICT = {"strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class Decomposition:
    """mass(d) ≈ a/(d² + c) + b: the weight on a key at distance d (cells), averaged over queries.

    `local_share` and `constant_share` are the mass of the two parts, `r2` is how much of the
    profile's variance over query–key pairs the curve explains.
    """

    __pydantic_config__ = STRICT

    a: float
    b: float
    c: float
    local_share: float
    constant_share: float
    r2: float

    def weight(self, distance: torch.Tensor) -> torch.Tensor:
        """distance [...] in cells → weight on a key there [...]."""
        return self.a / (distance**2 + self.c) + self.b


def decompose(
    mass: torch.Tensor, pairs: torch.Tensor, distances: torch.Tensor, height: int, width: int
) -> Decomposition:
    """Mass per ring [R], uniform's [R], distance of each ring [R] → least-squares fit, a, b ≥ 0.

    Least squares over all query–key pairs, so a ring is weighted by its pairs. For a given c, a and
    b solve two linear equations; scipy searches c, from the best of a coarse grid.
    """
    import numpy
    from scipy.optimize import minimize_scalar

    tokens = height * width
    seen = pairs > 0
    measured, uniform, distance = (t[seen].double().numpy() for t in (mass, pairs, distances))
    # In multiples of uniform attention, which keeps all numbers near 1.
    relative, weight, squared = measured / uniform, uniform / uniform.sum(), distance**2
    mean = float(weight @ relative)
    variance = float(weight @ (relative - mean) ** 2)
    if variance < 1e-12 or len(relative) < 3:
        return Decomposition(0.0, mean / tokens, 1.0, 0.0, mean, 1.0)

    def solve(log_c):
        """log c [n] → a, b, mean squared error [n], with a and b held at 0 or above."""
        shape = 1 / (squared + numpy.exp(numpy.atleast_1d(log_c))[:, None])
        level = shape @ weight
        spread = (shape - level[:, None]) ** 2 @ weight
        a = (shape - level[:, None]) @ (weight * relative) / numpy.maximum(spread, 1e-300)
        a = numpy.maximum(a, 0)
        b = mean - a * level
        below = b < 0
        through = (shape @ (weight * relative)) / (shape**2 @ weight)
        a, b = numpy.where(below, through, a), numpy.where(below, 0.0, b)
        error = (relative - a[:, None] * shape - b[:, None]) ** 2 @ weight
        return a, b, error

    low = 2 * numpy.log(_NARROWEST)
    high = 2 * numpy.log(max(_WIDEST * max(height, width), 2 * _NARROWEST))
    grid = numpy.linspace(low, high, 25)
    best = int(solve(grid)[2].argmin())
    bounds = (grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)])
    log_c = minimize_scalar(lambda x: float(solve(x)[2][0]), bounds=bounds, method="bounded").x
    a, b, error = (float(value[0]) for value in solve(log_c))
    c = float(numpy.exp(log_c))
    local = float(uniform @ (a / (squared + c)))
    return Decomposition(a / tokens, b / tokens, c, local, b, 1 - error / variance)


def receptive_field(
    mass: Sequence[float], uniform: Sequence[float], constant_share: float, share: float = 0.6
) -> int | None:
    """Width of the smallest odd window that holds `share` of the mass above the constant part.

    `mass` and `uniform` are the masses within windows of 1, 3, 5 … cells. None if less than
    LEAST_LOCAL is above the constant part.
    """
    above = 1 - constant_share
    if above < LEAST_LOCAL:
        return None
    for index, (inside, even) in enumerate(zip(mass, uniform, strict=True)):
        if inside - constant_share * even >= share * above - 1e-9:
            return 2 * index + 1
    return 2 * len(mass) - 1
