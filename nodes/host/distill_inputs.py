"""The distillation node's inputs, typed once, and the settings that they mean."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...deltaconv.distillation import PRESETS, DistillationSettings, StageSettings
from .distill_options import KERNELS, LOSSES, DistillOptions


@dataclass(frozen=True)
class DistillInputs:
    """All inputs but the model, by the node's own names. Values are checked where they are used.

    `latents` holds LATENTs. Without `minutes` the steps of the options are trained.
    """

    options: DistillOptions = field(default_factory=DistillOptions)
    latents: Sequence[dict] = ()
    prompts: str = ""
    choice: str = "fastest"
    minutes: float = 0.0
    folder: str = ""
    # A CLIP of the host.
    clip: object | None = None

    @property
    def published(self) -> bool:
        """Whether the authors' kernels are taken where they ship some for the model's family."""
        return self.options.kernels == KERNELS[0]

    @property
    def tokens(self) -> bool:
        """Whether blocks get pooled tokens; a recipe, or weights to go on from, come first."""
        given = self.options.recipe is not None or self.options.start is not None
        return self.options.kernels == KERNELS[2] and not given

    def settings(self) -> DistillationSettings:
        """The preset with everything that the nodes set; no steps where they are planned."""
        options = self.options
        steps = (0, 0) if self.minutes else (options.layer_steps, options.joint_steps)
        preset = LOSSES[options.losses]
        if self.tokens and preset == "default":
            preset = "tokens"
        return PRESETS[preset](
            # Another node may link in numbers of NumPy, or 1 for a yes.
            seed=int(options.seed),
            save_every=int(options.save_every),
            precision=options.precision,
            checkpointing=bool(options.gradient_checkpointing),
            init=options.initialization,
            min_snr=float(options.min_snr),
            eight_bit=bool(options.eight_bit),
            layers=self._stage(int(steps[0]), float(options.layer_rate)),
            joint=self._stage(int(steps[1]), float(options.joint_rate)),
        )

    def _stage(self, steps: int, rate: float) -> StageSettings:
        options = self.options
        return StageSettings(
            steps,
            lr=rate,
            # A short run warms up for a tenth of its steps.
            warmup=20 if self.minutes else min(20, steps // 10),
            batch=int(options.batch_size),
            accumulate=int(min(options.accumulate, options.batch_size)),
        )
