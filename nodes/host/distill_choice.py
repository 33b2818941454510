"""The choice of layers and steps within a distillation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from comfy.model_patcher import ModelPatcher

from ...deltaconv import DeltaConvBlock
from ...deltaconv.distillation.choice import ChoicePoint, SiteCost, choose, share_wanted
from ...deltaconv.distillation.choice_search import trade_off
from ...deltaconv.distillation.measure import guided_path
from ...deltaconv.distillation.settings import new_blocks
from ...deltaconv.geometry import BlockPlan
from ...deltaconv.weights.model import weights_of_blocks
from .choose import site_costs
from .teacher import ComfyTeacher

# Of the sampling that errors are measured on, and its prompts.
_STEPS, _PROMPTS = 8, 2


@dataclass
class Chooser:
    """Chooses from initialized blocks, once, by what each layer costs on this device.

    `wanted` is a preset of `choice.SHARES` or a share of the time; `said` takes what was chosen and
    why. Without an `unconditional` prompt errors are measured unguided.
    """

    teacher: ComfyTeacher
    conditions: Sequence
    unconditional: object | None
    shape: tuple[int, ...]
    wanted: str | float
    seed: int
    costs: Mapping[str, SiteCost]
    counted: str
    said: Callable[[str], None]
    progress: Callable[[float], None] = field(default=lambda share: None)

    def __call__(self, blocks: Mapping[str, DeltaConvBlock]) -> tuple[tuple[str, ...], float]:
        """The sites that get blocks, and the share of sampling from which on they act."""
        conditions = list(self.conditions[:_PROMPTS])
        noise = torch.stack(
            [
                torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed + row))
                for row in range(len(conditions))
            ]
        )
        path = guided_path(
            self.teacher,
            conditions,
            conditions[0] if self.unconditional is None else self.unconditional,
            noise,
            steps=_STEPS,
            cfg=1.0 if self.unconditional is None else 4.0,
        )
        measured = trade_off(
            path,
            self.teacher,
            blocks,
            self.costs,
            wanted=share_wanted(self.wanted),
            quick=True,
            progress=lambda done, most: self.progress(done / most),
        )
        point = choose(measured, self.wanted)
        self.said(self._sentence(point, len(blocks)))
        return point.replaced, point.start

    def _sentence(self, point: ChoicePoint, layers: int) -> str:
        return (
            f"{self.wanted}: blocks in {len(point.replaced)} of {layers} layers, from "
            f"{100 * point.start:.3g}% of sampling on, save {point.saved:.0%} of the time that "
            f"all of them would save in all steps ({self.counted})"
        )


def chooser(
    model: ModelPatcher,
    teacher: ComfyTeacher,
    plans: Mapping[str, BlockPlan],
    gate: str,
    shape: tuple[int, ...],
    **options,
) -> Chooser | None:
    """A Chooser of latents [C, H, W]; None, and said, where no block is faster than attention.

    Layers are timed here, with untrained blocks: call it before the teacher is loaded.
    """
    blocks = new_blocks(plans, teacher.dims, gate)
    weights = weights_of_blocks(blocks, family=teacher.family)
    rows = 1 if options["unconditional"] is None else 2
    costs, counted = site_costs(model, weights, tuple(shape[-2:]), rows)
    if not any(cost.saved > 0 and math.isfinite(cost.saved) for cost in costs.values()):
        options["said"]("no block is faster than attention at this size: all are distilled")
        return None
    return Chooser(teacher, shape=shape, costs=costs, counted=counted, **options)
