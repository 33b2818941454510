"""The distillation node's inputs, typed once, and the settings that they mean."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...deltaconv.distillation import PRESETS, DistillationSettings, StageSettings
from ...deltaconv.distillation.settings import Init, Precision
from ...deltaconv.locality.recipe import Recipe
from ...deltaconv.weights.model import DeltaConvWeights


@dataclass(frozen=True)
class DistillInputs:
    """All inputs but the model, the latents and their conditionings, by the node's own names.

    `preset` is the one of PRESETS whose losses are used; `published` takes the authors' kernels
    where they ship some for the model's family. Values are checked where they are used.
    """

    preset: str
    published: bool
    layer_steps: int
    joint_steps: int
    batch_size: int
    layer_rate: float
    joint_rate: float
    seed: int
    save_every: int
    preview_every: int
    initialisation: Init
    precision: Precision
    gradient_checkpointing: bool
    accumulate: int
    samples: int
    sample_size: int
    prompts: str = ""
    folder: str = ""
    recipe: Recipe | None = None
    start: DeltaConvWeights | None = None
    choice: str = "fastest"
    # A CONDITIONING, and a CLIP of the host.
    unconditional: Sequence | None = None
    clip: object | None = None
    # Inputs that workflows of earlier versions lack.
    min_snr: float = 0.0
    eight_bit: bool = False
    samples_mb: int = 1024

    def settings(self) -> DistillationSettings:
        """The preset with everything that the node sets itself."""
        return PRESETS[self.preset](
            # Another node may link in numbers of NumPy, or 1 for a yes.
            seed=int(self.seed),
            save_every=int(self.save_every),
            precision=self.precision,
            checkpointing=bool(self.gradient_checkpointing),
            init=self.initialisation,
            min_snr=float(self.min_snr),
            eight_bit=bool(self.eight_bit),
            layers=self._stage(int(self.layer_steps), float(self.layer_rate)),
            joint=self._stage(int(self.joint_steps), float(self.joint_rate)),
        )

    def _stage(self, steps: int, rate: float) -> StageSettings:
        return StageSettings(
            steps,
            lr=rate,
            # A short run warms up for a tenth of its steps.
            warmup=min(20, steps // 10),
            batch=int(self.batch_size),
            accumulate=int(min(self.accumulate, self.batch_size)),
        )
