"""How many steps fit into a time, from the pace that is measured on the device itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite

from .settings import DistillationSettings, StageSettings

_MOST_STEPS = 10**6
# Fewer joint steps cannot be relied on: behind the layers stage they changed the PSNR of the demo
# model's pictures by -0.2, -0.1 and +0.6 dB in three readings of 40 to 60 (docs/measurements.md).
FEWEST_JOINT = 100


@dataclass(frozen=True)
class Pace:
    """Seconds of one step of each stage; inf where the stage cannot run."""

    layers: float
    joint: float

    def __str__(self) -> str:
        return f"a layer step takes {self.layers:.2g} s, a joint step {self.joint:.2g} s"


# Pace and settings → the settings with the steps to train.
Plan = Callable[[Pace, DistillationSettings], DistillationSettings]


def steps_within(
    settings: DistillationSettings, pace: Pace, seconds: float
) -> DistillationSettings:
    """The settings with as many steps as fit into `seconds`, half of the time for each stage.

    A stage that cannot run leaves its half to the other, and so does the joint stage where fewer
    than `FEWEST_JOINT` steps of it fit. Settings that have steps already, which are done, get more
    of the last stage that they have. Warm-ups take a tenth of a stage at most.
    """
    layers, joint = settings.layers.steps, settings.joint.steps
    if joint:
        joint += _fit(seconds, pace.joint)
    elif not isfinite(pace.layers):
        joint = _fit(seconds, pace.joint)
    elif _fit(seconds if layers else seconds / 2, pace.joint) >= FEWEST_JOINT:
        joint = _fit(seconds if layers else seconds / 2, pace.joint)
        layers = layers or _fit(seconds / 2, pace.layers)
    else:
        layers += _fit(seconds, pace.layers)
    return with_steps(settings, layers, joint)


def with_steps(settings: DistillationSettings, layers: int, joint: int) -> DistillationSettings:
    """The settings with these steps; warm-ups take a tenth of a stage at most."""
    return replace(
        settings, layers=_stage(settings.layers, layers), joint=_stage(settings.joint, joint)
    )


def _fit(seconds: float, step: float) -> int:
    return max(0, min(_MOST_STEPS, int(seconds / max(step, 1e-9))))


def _stage(stage: StageSettings, steps: int) -> StageSettings:
    return replace(stage, steps=steps, warmup=min(stage.warmup, steps // 10))
