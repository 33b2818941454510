"""Student against teacher: error of ε̂ by noise level and by site, and samples of both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..block import DeltaConvBlock
from ..markdown import table
from .data import Dataset, draw
from .teacher import Condition, Teacher, Visit, in_place_of_attention, sample


@dataclass(frozen=True)
class LevelError:
    """At one noise level: MSE(ε̂_student, ε̂_teacher), the same over the power of ε̂_teacher, and
    each block's own error on the teacher's activations over the power of its layer's output."""

    sigma: float
    mse: float
    relative: float
    sites: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Errors by noise level, noisiest first, and the samples [B, C, H, W] of both."""

    levels: tuple[LevelError, ...]
    teacher: torch.Tensor
    student: torch.Tensor

    @property
    def mse(self) -> float:
        """Mean over the levels."""
        return sum(level.mse for level in self.levels) / len(self.levels)

    def report(self) -> str:
        """The figures in Markdown: levels first, then the sites from the worst down."""
        levels = [("sigma", "mse of ε̂", "relative")]
        levels += [(f"{e.sigma:.4f}", f"{e.mse:.5f}", f"{e.relative:.5f}") for e in self.levels]
        levels += [("mean", f"{self.mse:.5f}", "")]
        means = {
            site: sum(level.sites[site] for level in self.levels) / len(self.levels)
            for site in self.levels[0].sites
        }
        worst_first = sorted(means.items(), key=lambda item: -item[1])
        sites = [("block alone", "relative error")]
        sites += [(site, f"{error:.4f}") for site, error in worst_first]
        return f"{table(levels, words=0)}\n\n{table(sites)}"


@torch.no_grad()
def evaluate(
    teacher: Teacher,
    blocks: Mapping[str, DeltaConvBlock],
    conditions: Sequence[Condition],
    unconditional: Condition,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    *,
    steps: int = 20,
    cfg: float = 4.0,
    levels: int = 8,
    start: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Sample teacher and student for every condition and seed, then compare ε̂ on noised samples.

    `shape` is a latent's [C, H, W]. Pictures of equal seeds start from equal noise; ε̂ is compared
    on the teacher's own pictures, noised to `levels` levels. The student samples with blocks from
    `start` on; errors are of every level.
    """
    blocks = {site: block.to(teacher.device).eval() for site, block in blocks.items()}
    student = in_place_of_attention(blocks)
    pairs = [(condition, seed) for condition in conditions for seed in seeds]
    total = 2 * len(pairs) + levels
    drawn: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    for done, (condition, seed) in enumerate(pairs):
        noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))
        for index, (name, visit) in enumerate((("teacher", None), ("student", student))):
            arguments = (teacher, [condition], unconditional, noise)
            picture = sample(*arguments, steps=steps, cfg=cfg, visit=visit, start=start)
            drawn[name].append(picture.cpu())
            progress(2 * done + index + 1, total)
    pictures = torch.cat(drawn["teacher"])
    errors = []
    for index in range(levels):
        sigma = teacher.sigmas(torch.tensor([(index + 0.5) / levels], dtype=torch.float64))
        errors.append(_level(teacher, blocks, student, pictures, [c for c, _ in pairs], sigma))
        progress(2 * len(pairs) + index + 1, total)
    return Evaluation(tuple(errors), pictures, torch.cat(drawn["student"]))


def _level(
    teacher: Teacher,
    blocks: Mapping[str, DeltaConvBlock],
    student: Visit,
    pictures: torch.Tensor,
    conditions: Sequence[Condition],
    sigma: torch.Tensor,
) -> LevelError:
    generator = torch.Generator().manual_seed(0)
    sites: dict[str, float] = {}

    def observe(site, x, attend):
        y = attend()
        if site in blocks:
            error = (blocks[site](x.float()) - y.float()).square().mean()
            relative = (error / y.float().square().mean().clamp_min(1e-12)).item()
            sites[site] = sites.get(site, 0.0) + relative / len(pictures)
        return y

    mse = power = 0.0
    for picture, condition in zip(pictures, conditions, strict=True):
        noise = torch.randn(picture[None].shape, generator=generator).to(teacher.device)
        level = sigma.float().to(teacher.device)
        x = teacher.noised(picture[None].to(teacher.device), noise, level)
        expected = teacher.predict(x, level, [condition], observe)
        got = teacher.predict(x, level, [condition], student)
        mse += (got - expected).square().mean().item() / len(pictures)
        power += expected.square().mean().item() / len(pictures)
    return LevelError(float(sigma), mse, mse / max(power, 1e-12), sites)


@torch.no_grad()
def held_out_error(
    teacher: Teacher,
    blocks: Mapping[str, DeltaConvBlock],
    dataset: Dataset,
    *,
    batches: int = 8,
    batch: int = 8,
    seed: int = 12345,
    unconditional: float = 0.1,
) -> float:
    """MSE(ε̂_student, ε̂_teacher) on noise from `seed`, at uniform steps.

    `unconditional` is the share of the images without their prompts.
    """
    blocks = {site: block.to(teacher.device).eval() for site, block in blocks.items()}
    student = in_place_of_attention(blocks)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for position in range(batches):
        inputs = draw(
            dataset,
            teacher,
            generator,
            seed=seed,
            batch=batch,
            position=position,
            unconditional=unconditional,
        )
        arguments = (inputs.x, inputs.sigma, inputs.conditions)
        error = teacher.predict(*arguments, student) - teacher.predict(*arguments)
        total += error.square().mean().item() / batches
    return total
