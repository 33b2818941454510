"""The interface to the host: a diffusion model whose self-attention can be observed or replaced."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

from ..locality.attention import ValueMap

# One image's conditioning, as the host makes it of a prompt; opaque to distillation.
Condition = object
# look(q, k, scale) sees q, k [B, heads, H · W, d] behind norms and rotary positions, as attention
# compares them.
Look = Callable[[torch.Tensor, torch.Tensor, float | None], None]


class Attend(Protocol):
    """Runs the layer itself → y [B, H, W, C]; `look` is called where its q and k can be seen."""

    def __call__(self, look: Look | None = None) -> torch.Tensor: ...


# visit(site, x [B, H, W, C], attend) → y [B, H, W, C].
Visit = Callable[[str, torch.Tensor, Attend], torch.Tensor]


class Teacher(Protocol):
    """A diffusion model with self-attention sites. Sigma is its noise level, one per image."""

    # Site path → channels C, in the order in which the network runs them.
    dims: Mapping[str, int]
    # Identifies the base and its weights, LoRAs included; states of another base are refused.
    fingerprint: str
    family: str
    base_model: str
    device: torch.device
    # The dtype that its layers compute in, not the one they are stored in.
    dtype: torch.dtype
    # "" where gradients pass through its weights, else the reason why not.
    why_not_differentiable: str

    def sigmas(self, position: torch.Tensor) -> torch.Tensor:
        """position [B] in (0, 1), 0 the noisiest step → sigma [B]."""

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """latents, noise [B, C, H, W], sigma [B] → the model's input at that sigma."""

    def predict(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        conditions: Sequence[Condition],
        visit: Visit | None = None,
        features: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """x [B, C, H, W], sigma [B] → ε̂ = (x − x̂₀) / sigma in float32.

        `visit` replaces every site's attention; `features` is filled with the hidden state after
        each site's residual add. `visit` may see the images of one batch in several calls, where
        their conditions do not fit into one. The caller sets the gradient mode.
        """

    def checkpointing(self, active: bool) -> None:
        """Recompute the base's activations in the backward pass instead of keeping them."""

    def values(self, site: str) -> ValueMap | None:
        """The site's value map; None where its keys are not the map's own tokens."""

    def token_heads(self, site: str) -> int:
        """The layer's heads, where its scores are of linear maps of C channels alone; else 0."""

    def projections(self, site: str) -> torch.Tensor:
        """The maps [3C, C] to queries, keys and values, of a site that has `token_heads`."""


def in_place_of_attention(
    blocks: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
) -> Visit:
    """A visit that runs each site's block on the map in float32; other sites attend."""

    def visit(site: str, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        return blocks[site](x.float()).to(x.dtype) if site in blocks else attend()

    return visit


class Prediction(NamedTuple):
    """ε̂ [B, C, H, W] with each image's condition, and with the unconditional one."""

    conditional: torch.Tensor
    unconditional: torch.Tensor

    def guided(self, cfg: float) -> torch.Tensor:
        """What a sampler steps along under classifier-free guidance."""
        if cfg == 1:
            return self.conditional
        return self.unconditional + cfg * (self.conditional - self.unconditional)


class Point(NamedTuple):
    """The state x [B, C, H, W] before a sampler's step, at sigma [B], and what the model said."""

    x: torch.Tensor
    sigma: torch.Tensor
    predicted: Prediction


def predict_both(
    teacher: Teacher,
    x: torch.Tensor,
    sigma: torch.Tensor,
    conditions: Sequence[Condition],
    unconditional: Condition,
    visit: Visit | None = None,
) -> Prediction:
    """ε̂ of x [B, C, H, W] at sigma [B] with `conditions` and without, in one call."""
    batch = len(x)
    both = [*conditions, *[unconditional] * batch]
    eps = teacher.predict(torch.cat([x, x]), torch.cat([sigma, sigma]), both, visit)
    return Prediction(eps[:batch], eps[batch:])


def noise_levels(teacher: Teacher, steps: int) -> list[float]:
    """The sigmas of `steps` sampling steps that are uniform in position, and the final 0."""
    edges = torch.arange(steps, dtype=torch.float64) / steps + 0.5 / max(steps, 500)
    return [float(teacher.sigmas(edge[None])[0]) for edge in edges] + [0.0]


@torch.no_grad()
def sample(
    teacher: Teacher,
    conditions: Sequence[Condition],
    unconditional: Condition,
    noise: torch.Tensor,
    *,
    steps: int = 30,
    cfg: float = 4.0,
    visit: Visit | None = None,
    start: float = 0.0,
    points: list[Point] | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> torch.Tensor:
    """noise [B, C, H, W] → latents [B, C, H, W] by Euler steps in sigma (DDIM for an ε-model).

    Steps are uniform in position; those before `start` go without `visit`. `points` collects one
    Point per step; at `cfg` 1 its unconditional prediction is the conditional one. `progress` hears
    the number of steps done.
    """
    levels = noise_levels(teacher, steps)
    x = noise.to(teacher.device)
    batch = len(x)
    x = teacher.noised(torch.zeros_like(x), x, torch.full((batch,), levels[0], device=x.device))
    for step, (level, following) in enumerate(pairwise(levels)):
        sigma = torch.full((batch,), level, device=x.device)
        seen = visit if step / steps >= start else None
        conditional = teacher.predict(x, sigma, conditions, seen)
        free = conditional
        if cfg != 1:
            free = teacher.predict(x, sigma, [unconditional] * batch, seen)
        predicted = Prediction(conditional, free)
        if points is not None:
            points.append(Point(x, sigma, predicted))
        x = x + (following - level) * predicted.guided(cfg)
        progress(step + 1)
    return x
