"""A student's error step by step along the teacher's own, guided sampling.

Sampling adds Δσ · ε̂ to its state x at every step, with ε̂ guided. A student's step there goes
wrong by Δσ · δε̂, and what comes later carries that error as it carries the state: noise fades, the
picture grows. The step's error is therefore counted against the state's own power,
Δσ² · mean δε̂² / mean x². A step that attention takes adds nothing, so that one measurement tells
what every range of steps adds.

Their plain sum does not rank ranges as pictures do: on the demo model an error of the first step
ends up some fifty times as large, against that of the last, as it says. `choice_search` learns that
growth from samplings, and `GuidedPath.sampled` gives the true end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .teacher import Condition, Point, Teacher, Visit, noise_levels, predict_both, sample


@dataclass(frozen=True)
class GuidedPath:
    """The teacher's own sampling of some pictures: states [B, C, H, W] before each of T steps.

    `latents` [B, C, H, W] is where it ends. Calls at `cfg` 1 leave the unconditional half out.
    """

    points: tuple[Point, ...]
    latents: torch.Tensor
    conditions: Sequence[Condition]
    unconditional: Condition
    cfg: float

    @property
    def positions(self) -> list[float]:
        """Where each step begins in sampling: 0 the noisiest."""
        return [step / len(self.points) for step in range(len(self.points))]

    @torch.no_grad()
    def errors(self, teacher: Teacher, visit: Visit) -> list[float]:
        """Each step's share of the error of sampling with `visit`; their sum is the measure."""
        levels = noise_levels(teacher, len(self.points))
        return [
            self._error(teacher, visit, point, after - before)
            for point, (before, after) in zip(self.points, pairwise(levels), strict=True)
        ]

    @torch.no_grad()
    def sampled(self, teacher: Teacher, visit: Visit, step: int = 0) -> torch.Tensor:
        """The latents [B, C, H, W] that sampling with `visit` from `step` on ends at."""
        x = self.points[step].x
        levels = noise_levels(teacher, len(self.points))[step:]
        for before, after in pairwise(levels):
            sigma = torch.full((len(x),), before, device=x.device)
            x = x + (after - before) * self._guided(teacher, visit, x, sigma)
        return x

    def _guided(self, teacher: Teacher, visit: Visit, x: torch.Tensor, sigma: torch.Tensor):
        if self.cfg == 1:
            return teacher.predict(x, sigma, self.conditions, visit)
        arguments = (x, sigma, self.conditions, self.unconditional, visit)
        return predict_both(teacher, *arguments).guided(self.cfg)

    def _error(self, teacher: Teacher, visit: Visit, point: Point, step: float) -> float:
        x, sigma, expected = point
        got = self._guided(teacher, visit, x, sigma)
        error = (got - expected.guided(self.cfg)).square().mean()
        return float(step**2 * error / x.square().mean().clamp_min(1e-12))


def guided_path(
    teacher: Teacher,
    conditions: Sequence[Condition],
    unconditional: Condition,
    noise: torch.Tensor,
    *,
    steps: int = 10,
    cfg: float = 4.0,
    **heard,
) -> GuidedPath:
    """Sample `conditions` from noise [B, C, H, W] by the teacher, and keep what it did."""
    points: list[Point] = []
    latents = sample(
        teacher, conditions, unconditional, noise, steps=steps, cfg=cfg, points=points, **heard
    )
    return GuidedPath(tuple(points), latents, tuple(conditions), unconditional, cfg)
