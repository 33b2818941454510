"""Training data: latents with conditions; seed and position determine every draw."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .order import EpochOrders
from .settings import DistillationError
from .teacher import Condition, Prediction, Teacher


@dataclass(frozen=True)
class Batch:
    """x [B, C, H, W] at sigma [B]; ε is the noise in it. All on the teacher's device.

    `predicted` is what the teacher said there, where that was kept for all of them. `hidden` is,
    by site, the state h [B, ways, …] after the residual add, kept in 16 bits in main memory: one
    way, each image under its condition, or two, with it and without.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    noise: torch.Tensor
    conditions: list[Condition]
    unconditional: Condition
    predicted: Prediction | None = None
    hidden: Mapping[str, torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """What its maps take."""
        maps = [self.x, self.noise, *(self.predicted or ()), *(self.hidden or {}).values()]
        return sum(each.nbytes for each in maps)

    def parts(self, count: int) -> Iterator["Batch"]:
        """The images in at most `count` parts, equally large but for the last."""
        yield from self.split(part_sizes(len(self), count))

    def split(self, sizes: Sequence[int]) -> Iterator["Batch"]:
        """The images in parts of these sizes, which must add up to all."""
        at = 0
        for size in sizes:
            rows = slice(at, at + size)
            at += size
            yield Batch(
                self.x[rows],
                self.sigma[rows],
                self.noise[rows],
                self.conditions[rows],
                self.unconditional,
                self.predicted and Prediction(*(half[rows] for half in self.predicted)),
                self.hidden and {site: h[rows] for site, h in self.hidden.items()},
            )

    def both_ways(self) -> "Batch":
        """Every image twice: with its condition, and behind them all without."""
        return Batch(
            torch.cat([self.x, self.x]),
            torch.cat([self.sigma, self.sigma]),
            torch.cat([self.noise, self.noise]),
            [*self.conditions, *[self.unconditional] * len(self)],
            self.unconditional,
        )

    def __len__(self) -> int:
        return len(self.x)


def part_sizes(images: int, count: int) -> list[int]:
    """Images of each of at most `count` parts, equally large but for the last."""
    size = -(-images // count)
    return [min(size, images - at) for at in range(0, images, size)]


@dataclass(frozen=True)
class Trajectory:
    """Points of one image's sampling: x [T, C, H, W] at sigma [T].

    `predicted` [T, 2, C, H, W] is the teacher's ε̂ there, with the image's condition and without.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    predicted: torch.Tensor | None = None


@dataclass
class Dataset:
    """latents [C, H, W] each, sizes may differ, with one condition each or one for all.

    `trajectories` holds each image's sampling points, drawn beside noised latents.
    """

    latents: Sequence[torch.Tensor]
    conditions: Sequence[Condition]
    unconditional: Condition
    trajectories: Sequence[Trajectory] | None = None
    _orders: EpochOrders | None = field(default=None, repr=False)

    def __post_init__(self):
        if not self.latents:
            raise DistillationError("Expected at least one latent to train on, got none.")
        if len(self.conditions) == 1:
            self.conditions = [self.conditions[0]] * len(self.latents)
        if len(self.conditions) != len(self.latents):
            raise DistillationError(
                f"Expected one condition for all or one per latent, got {len(self.conditions)} for "
                f"{len(self.latents)} latents."
            )
        for index, latent in enumerate(self.latents):
            if latent.ndim != 3 or not latent.isfinite().all():
                raise DistillationError(
                    f"Expected finite latents [C, H, W], got {list(latent.shape)}"
                    f"{' with NaN or infinite values' if latent.ndim == 3 else ''} at {index}."
                )

    def indices(self, seed: int, batch: int, position: int) -> list[int]:
        """The images of draw number `position`: every image once per epoch, one size per batch."""
        if self._orders is None:
            self._orders = EpochOrders([tuple(latent.shape) for latent in self.latents])
        return self._orders.indices(seed, batch, position)

    def images(
        self, seed: int, batch: int, position: int, rows: Sequence[int]
    ) -> tuple[list[int], list[torch.Tensor], list[Condition]]:
        """Index, latent and condition of these rows of draw number `position`."""
        indices = self.indices(seed, batch, position)
        chosen = [indices[row] for row in rows]
        latents = [self.latents[index] for index in chosen]
        return chosen, latents, [self.conditions[index] for index in chosen]


def _step(quantile: torch.Tensor, start: float, growth: float) -> torch.Tensor:
    """Quantile [B] → step of start…1, of a density that falls from growth to 1 over all of 0…1."""
    rest = growth ** (1 - start)
    if rest > 1:
        quantile = torch.log1p(quantile * (1 / rest - 1)) / -math.log(rest)
    return start + (1 - start) * quantile


def draw(
    dataset: Dataset,
    teacher: Teacher,
    generator: torch.Generator,
    *,
    seed: int,
    batch: int,
    position: int,
    unconditional: float,
    trajectory_share: float = 0.0,
    start: float = 0.0,
    growth: float = 1.0,
    rows: Sequence[int] | None = None,
) -> Batch:
    """One batch: sigmas over the steps, stratified, some conditions dropped.

    `start` is the share of the steps, from the noisiest on, that is left out. The first of all is
    drawn `growth` times as often as the last, which falls evenly; 1: all alike. Every image has its
    own stratum of the rest, so that each batch covers all of its sigmas. All random numbers come
    from `generator` on the CPU, so that they agree across devices. `rows` are the images of the
    batch that this process takes, None all of them: only these are read, and random numbers are
    drawn for all, so that no process's share depends on how many there are.
    """
    rows = range(batch) if rows is None else rows
    indices, images, captions = dataset.images(seed, batch, position, rows)
    latents = torch.stack(images).float()
    noise = torch.randn((batch, *latents.shape[1:]), generator=generator)
    within = torch.rand(batch, generator=generator, dtype=torch.float64)
    # Shuffled: every part of a batch then covers the same range.
    strata = torch.randperm(batch, generator=generator)
    steps = _step((strata + within) / batch, start, growth).clamp(5e-4, 1 - 5e-4)
    dropped = (torch.rand(batch, generator=generator) < unconditional).tolist()
    on_path = torch.rand(batch, generator=generator) < trajectory_share
    picks = _step(torch.rand(batch, generator=generator), 0.0, growth ** (1 - start))
    if len(rows) < batch:
        noise, steps, on_path, picks = (each[rows] for each in (noise, steps, on_path, picks))
        dropped = [dropped[row] for row in rows]

    device = teacher.device
    sigma = teacher.sigmas(steps).float().to(device)
    latents, noise = latents.to(device), noise.to(device)
    x = teacher.noised(latents, noise, sigma)
    # The target of ε̂ = (x − x̂₀) / sigma, for flow models as for ε-models.
    noise = (x - latents) / sigma[:, None, None, None]
    known: list[torch.Tensor] = []
    if dataset.trajectories is not None and on_path.any():
        x, sigma, noise = x.clone(), sigma.clone(), noise.clone()
        highest = float(teacher.sigmas(torch.tensor([max(start, 5e-4)], dtype=torch.float64))[0])
        for row in on_path.nonzero().flatten().tolist():
            path = dataset.trajectories[indices[row]]
            first = min(int((path.sigma > highest).sum()), len(path.sigma) - 1)
            count = len(path.sigma) - first
            point = first + min(int(picks[row] * count), count - 1)
            x[row] = path.x[point].to(x)
            sigma[row] = path.sigma[point].to(sigma)
            noise[row] = (x[row] - latents[row]) / sigma[row]
            if path.predicted is not None:
                with_condition, without = path.predicted[point].to(x)
                known.append(torch.stack([without if dropped[row] else with_condition, without]))
    conditions = [
        dataset.unconditional if drop else caption
        for caption, drop in zip(captions, dropped, strict=True)
    ]
    # A batch that is known in part needs the teacher's pass as a whole.
    predicted = Prediction(*torch.stack(known, 1)) if len(known) == len(rows) else None
    return Batch(x, sigma, noise, conditions, dataset.unconditional, predicted)
