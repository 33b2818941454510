"""The losses of the two training stages, each computed and propagated for one part of a batch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .data import Batch
from .settings import DistilSettings
from .student import Student
from .teacher import Teacher

Backward = Callable[[torch.Tensor], None]
Losses = dict[str, torch.Tensor]


def layer_losses(
    teacher: Teacher, student: Student, batch: Batch, share: float, backward: Backward
) -> Losses:
    """Every block regresses its own layer in one teacher pass: site → loss over output power.

    No gradient passes through the base; each block's graph is freed before the next site runs.
    `share` is this part's weight in the step. A host may show a site its images in several turns.
    """
    losses: Losses = {}

    def visit(site, x, attend):
        y = attend()
        if site in student.blocks:
            with torch.enable_grad():
                target = y.detach().float()
                # A clone where the host computes in inference mode: those tensors cannot be saved.
                source = x.clone() if x.is_inference() else x.detach()
                error = F.mse_loss(student.run(site, source).float(), target)
                loss = error / target.square().mean().clamp_min(1e-12) * (len(x) / len(batch))
                backward(loss * share)
            losses[site] = losses.get(site, 0.0) + loss.detach()
        return y

    with torch.no_grad():
        teacher.predict(batch.x, batch.sigma, batch.conditions, visit)
    return losses


def joint_losses(
    teacher: Teacher,
    student: Student,
    batch: Batch,
    share: float,
    backward: Backward,
    settings: DistilSettings,
) -> Losses:
    """The student on its own features against the teacher: weighted loss by name.

    noise MSE(ε̂_student, ε), teacher MSE(ε̂_student, ε̂_teacher), features Σ MSE(h_student, h_teacher)
    over the hidden states after each site's residual add, normalised_features the mean of these
    over the power of h_teacher. Source of the first three: arXiv 2504.21292.
    """
    weights = {name: weight for name, weight in settings.losses.items() if weight}
    by_feature = bool(weights.keys() & {"features", "normalised_features"})
    goal: dict | None = {} if by_feature else None
    own: dict | None = {} if by_feature else None
    inputs = (batch.x, batch.sigma, batch.conditions)
    with torch.no_grad():
        expected = teacher.predict(*inputs, None, goal)
    with torch.enable_grad():
        got = teacher.predict(*inputs, student.visit, own)
        losses = {}
        per_image = _min_snr(batch.sigma, settings.min_snr)
        for name, target in (("noise", batch.noise), ("teacher", expected)):
            if name in weights:
                errors = (got - target).square().flatten(1).mean(1)
                losses[name] = weights[name] * (errors * per_image).mean()
        if by_feature:
            # The blocks' sites alone: a plain site's state differs only by what came before.
            sites = [site for site in goal if site in student.blocks]
            errors = {site: F.mse_loss(own[site].float(), goal[site].float()) for site in sites}
            if "features" in weights:
                losses["features"] = weights["features"] * sum(errors.values())
            if "normalised_features" in weights:
                relative = [
                    error / goal[site].float().square().mean().clamp_min(1e-12)
                    for site, error in errors.items()
                ]
                losses["normalised_features"] = (
                    weights["normalised_features"] * sum(relative) / len(relative)
                )
        backward(sum(losses.values()) * share)
    return {name: loss.detach() for name, loss in losses.items()}


def _min_snr(sigma: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR weights for an ε loss: min(SNR, γ) / SNR, SNR = 1/σ². Source: arXiv 2303.09556."""
    if not gamma:
        return torch.ones_like(sigma)
    return (gamma * sigma.square()).clamp_max(1.0)
