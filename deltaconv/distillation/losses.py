"""The losses of both training stages and their gradients, part by part of a batch."""

from collections.abc import Callable, Iterable
from functools import reduce

import torch
import torch.nn.functional as F
from einops import rearrange

from .data import Batch
from .settings import DistillationSettings, Loss
from .student import Student
from .teacher import Prediction, Teacher

Backward = Callable[[torch.Tensor], None]
Losses = dict[str, torch.Tensor]

_TINY = 1e-12


class LayerLosses:
    """Each block regresses its own layer: site → squared error over the layer's output power.

    No gradient passes through the base; each block's graph is freed before the next site runs.
    A site's error affects its own block alone: the parts of a batch of `images` are divided by the
    first part's power, and `finish` rescales the gradients to the whole batch's power.
    """

    def __init__(self, student: Student, images: int, backward: Backward):
        self.student, self.images, self.backward = student, images, backward
        self.errors: Losses = {}
        self.powers: Losses = {}
        self.units: Losses = {}

    def add(self, teacher: Teacher, part: Batch) -> None:
        """Gradients of one part, in one teacher pass; a host may call a site several times."""

        def visit(site, x, attend):
            y = attend()
            if site in self.student.blocks:
                self._regress(site, x, y.detach().float())
            return y

        with torch.no_grad():
            teacher.predict(part.x, part.sigma, part.conditions, visit)

    def finish(self) -> Losses:
        """The gradients and losses of the whole batch."""
        for site, unit in self.units.items():
            if self.powers[site] is not unit:
                factor = unit / self.powers[site].clamp_min(_TINY)
                for parameter in self.student.blocks[site].parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
        return {site: e / self.powers[site].clamp_min(_TINY) for site, e in self.errors.items()}

    def _regress(self, site: str, x: torch.Tensor, target: torch.Tensor) -> None:
        share = len(x) / self.images
        power = target.square().mean() * share
        unit = self.units.setdefault(site, power)
        with torch.enable_grad():
            # Autograd cannot save tensors of inference mode.
            source = x.clone() if x.is_inference() else x.detach()
            error = F.mse_loss(self.student.run(site, source).float(), target) * share
            self.backward(error / unit.clamp_min(_TINY))
        known = site in self.errors
        self.errors[site] = self.errors[site] + error.detach() if known else error.detach()
        self.powers[site] = self.powers[site] + power if known else power


def batch_losses(
    teacher: Teacher,
    student: Student,
    batch: Batch,
    parts: int,
    backward: Backward,
    settings: DistillationSettings,
    joint: bool,
) -> dict[str, float]:
    """Gradients of the whole batch, in `parts` parts; loss by name, mean over its images.

    Names are those of `joint_losses`, or the sites where the stage is not the joint one.
    """
    if not joint:
        layers = LayerLosses(student, len(batch), backward)
        for part in batch.parts(parts):
            layers.add(teacher, part)
        return {name: float(loss) for name, loss in layers.finish().items()}
    totals: Losses = {}
    for part in batch.parts(parts):
        share = len(part) / len(batch)
        losses = joint_losses(teacher, student, part, share, backward, settings)
        for name, loss in losses.items():
            weighted = loss.double() * share
            totals[name] = totals[name] + weighted if name in totals else weighted
    return {name: float(total) for name, total in totals.items()}


def compares_features(settings: DistillationSettings) -> bool:
    """Whether the joint stage needs the teacher's hidden states."""
    return any(settings.losses.get(name) for name in ("features", "normalised_features"))


def joint_losses(
    teacher: Teacher,
    student: Student,
    batch: Batch,
    share: float,
    backward: Backward,
    settings: DistillationSettings,
    pooled: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Losses:
    """The student on its own features against the teacher: weighted loss by name.

    noise MSE(ε̂_student, ε), teacher MSE(ε̂_student, ε̂_teacher), features Σ MSE(h_student, h_teacher)
    over the hidden states after each site's residual add, normalised_features the mean of these
    over the power of h_teacher in this part of the batch. Source of these: arXiv 2504.21292, but
    for the last. guided is the teacher loss of what a sampler steps along: every image is computed
    with its condition and without, for the other losses too. `share` is the part's weight in the
    step. Where a part is spread over processes, `pooled` gives the powers of h_teacher [sites] in
    all of it for those in what is here.
    """
    weights = {name: weight for name, weight in settings.losses.items() if weight}
    by_feature = compares_features(settings)
    known = batch.predicted if batch.hidden or not by_feature else None
    goal: Losses = {
        site: rearrange(h, "b ways ... -> (ways b) ...") for site, h in (batch.hidden or {}).items()
    }
    if "guided" in weights:
        batch = batch.both_ways()
    own: Losses = {}
    inputs = (batch.x, batch.sigma, batch.conditions)
    if known is None:
        with torch.no_grad():
            expected = teacher.predict(*inputs, None, goal if by_feature else None)
    else:
        expected = torch.cat(known) if "guided" in weights else known.conditional
    with torch.enable_grad():
        got = teacher.predict(*inputs, student.visit, own if by_feature else None)
        losses: Losses = {}
        per_image = _min_snr(batch.sigma, settings.min_snr)
        targets: dict[Loss, torch.Tensor] = {"noise": batch.noise, "teacher": expected}
        for name, target in targets.items():
            if name in weights:
                losses[name] = weights[name] * (_per_image(got - target) * per_image).mean()
        if "guided" in weights:
            error = Prediction(*(got - expected).chunk(2)).guided(settings.guidance)
            levels = per_image[: len(error)]
            losses["guided"] = weights["guided"] * (_per_image(error) * levels).mean()
        if by_feature:
            # The blocks' sites alone: other sites' states differ only through earlier blocks.
            sites = [site for site in goal if site in student.blocks]
            # Kept ones are in main memory.
            goal = {site: goal[site].to(own[site].device, torch.float32) for site in sites}
            errors = {site: F.mse_loss(own[site].float(), goal[site]) for site in sites}
            if "features" in weights:
                losses["features"] = weights["features"] * _sum(errors.values())
            if "normalised_features" in weights:
                powers = [goal[site].square().mean() for site in sites]
                if pooled:
                    powers = list(pooled(torch.stack(powers)))
                relative = [
                    error / power.clamp_min(_TINY)
                    for error, power in zip(errors.values(), powers, strict=True)
                ]
                weight = weights["normalised_features"]
                losses["normalised_features"] = weight * _sum(relative) / len(relative)
        backward(_sum(losses.values()) * share)
    return {name: loss.detach() for name, loss in losses.items()}


def _per_image(error: torch.Tensor) -> torch.Tensor:
    """error [B, C, H, W] → its mean square [B]."""
    return error.square().flatten(1).mean(1)


def _sum(losses: Iterable[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, losses)


def _min_snr(sigma: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR weights for an ε loss: min(SNR, γ) / SNR, SNR = 1/σ². Source: arXiv 2303.09556."""
    if not gamma:
        return torch.ones_like(sigma)
    return (gamma * sigma.square()).clamp_max(1.0)
