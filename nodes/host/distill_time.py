"""A distillation within a time: what is drawn, what is initialized on, how many steps follow."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ...deltaconv.distillation import DistillationSettings
from ...deltaconv.distillation.plan import Pace, steps_within
from .teacher import ComfyTeacher

# Shares of the whole time: own samples, and the initialization, which sees each image twice.
_SAMPLES, _INIT = 0.2, 0.2
_FEWEST_IMAGES = 16
# Of what is left when steps are planned: pictures and saving take the rest.
_STEPS = 0.9


@dataclass
class TimeBudget:
    """`seconds` from now on; without any nothing is planned, and it never ends."""

    seconds: float
    began: float = field(default_factory=lambda: time.monotonic())

    def __bool__(self) -> bool:
        return self.seconds > 0

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    @property
    def over(self) -> bool:
        """Whether there is a time, and it has passed."""
        return bool(self) and self.spent > self.seconds

    def enough_samples(self, drawn: int) -> bool:
        """Whether to draw no more own samples."""
        return bool(self) and drawn > 0 and self.spent > _SAMPLES * self.seconds

    def fitted(
        self,
        settings: DistillationSettings,
        teacher: ComfyTeacher,
        conditions: Sequence,
        shape: tuple[int, ...],
    ) -> DistillationSettings:
        """The settings with as many images for the initialization as fit, whole batches of them.

        The teacher must be loaded: a call of it is timed on latents [C, H, W].
        """
        if not self or settings.init != "informed":
            return settings
        batch = settings.layers.batch
        fit = _INIT * self.seconds / (2 * seconds_per_image(teacher, conditions, shape))
        images = batch * max(-(-_FEWEST_IMAGES // batch), int(fit / batch))
        return replace(settings, init_images=min(images, settings.init_images))

    def plan(self, pace: Pace, settings: DistillationSettings) -> DistillationSettings:
        """The settings with the steps that fit into what is left."""
        return steps_within(settings, pace, _STEPS * (self.seconds - self.spent))


def seconds_per_image(
    teacher: ComfyTeacher, conditions: Sequence, shape: tuple[int, ...], images: int = 2
) -> float:
    """Seconds that a loaded teacher's call takes per image: the second of two, the first loads."""
    x, sigma = torch.zeros(images, *shape), torch.ones(images)
    x, sigma = x.to(teacher.device), sigma.to(teacher.device)
    seconds = 0.0
    with torch.no_grad():
        for _ in range(2):
            started = time.monotonic()
            # Reading a value waits for the device.
            teacher.predict(x, sigma, [conditions[0]] * images).sum().item()
            seconds = time.monotonic() - started
    return seconds / images
