"""The published decomposition of attention: a part that falls off with distance, and a constant."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Below this share of mass above the constant part there is no field to speak of.
LEAST_LOCAL = 0.02


@dataclass(frozen=True)
class Decomposition:
    """mass(d) ≈ a/(d² + c) + b: the weight on a key at distance d (cells), averaged over queries.

    `local_share` and `constant_share` are the mass of the two parts, `r2` is how much of the
    profile's variance over query–key pairs the curve explains.
    """

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
    mass: torch.Tensor, pairs: torch.Tensor, distances: torch.Tensor, tokens: int
) -> Decomposition:
    """Mass per ring [R], uniform's [R], distance of each ring [R] → least-squares fit, a, b ≥ 0.

    Least squares over all query–key pairs, so a ring counts by its pairs; scipy does the fitting.
    """
    import numpy
    from scipy.optimize import curve_fit

    seen = pairs > 0
    mass, pairs, distances = (t[seen].double().numpy() for t in (mass, pairs, distances))
    # In multiples of uniform attention, which keeps all numbers near 1.
    relative = mass / pairs
    squared = distances**2
    mean = float((pairs * relative).sum() / pairs.sum())
    spread = float((pairs * (relative - mean) ** 2).sum())
    if spread < 1e-12:
        return Decomposition(0.0, mean / tokens, 1.0, 0.0, mean, 1.0)

    def curve(squared, log_peak, log_c, b):
        c = numpy.exp(log_c)
        return numpy.exp(log_peak) * c / (squared + c) + b

    peak = max(float(relative[0]) - mean, 1e-3)
    bounds = ([-20.0, -7.0, 0.0], [20.0, 14.0, max(2.0, 2 * float(relative.max()))])
    best, error = None, float("inf")
    # The width of the local part is what a fit can get stuck on: start from three.
    for width in (0.5, 3.0, 12.0):
        start = (numpy.log(peak), 2 * numpy.log(width), min(max(mean / 2, 0.1), 1.9))
        try:
            found, _ = curve_fit(
                curve, squared, relative, start, sigma=pairs**-0.5, bounds=bounds, maxfev=400
            )
        except RuntimeError:
            continue
        residual = float((pairs * (relative - curve(squared, *found)) ** 2).sum())
        if residual < error:
            best, error = found, residual
    if best is None:
        return Decomposition(0.0, mean / tokens, 1.0, 0.0, mean, 0.0)
    c, b = float(numpy.exp(best[1])), float(best[2])
    a = float(numpy.exp(best[0])) * c
    local = float((pairs * a / (squared + c)).sum())
    return Decomposition(a / tokens, b / tokens, c, local, b, 1 - error / spread)


def receptive_field(
    mass: Sequence[float], uniform: Sequence[float], constant_share: float, share: float = 0.6
) -> int | None:
    """Width of the smallest odd window that holds `share` of the mass above the constant part.

    `mass` and `uniform` are the masses within windows of 1, 3, 5 … cells. None where there is
    hardly any such mass: the layer is a constant, and no window describes it.
    """
    above = 1 - constant_share
    if above < LEAST_LOCAL:
        return None
    for index, (inside, even) in enumerate(zip(mass, uniform, strict=True)):
        if inside - constant_share * even >= share * above - 1e-9:
            return 2 * index + 1
    return 2 * len(mass) - 1
