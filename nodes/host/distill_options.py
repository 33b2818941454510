"""What the settings node carries to the distillation node, with the defaults of both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ...deltaconv.locality.recipe import Recipe
    from ...deltaconv.weights.model import DeltaConvWeights

KERNELS = ("published, else by size", "by size", "5 and pooled tokens")
# The widget's option → the preset whose losses it stands for.
LOSSES = {"ours": "default", "published": "paper", "authors' code (SD1.5)": "code-sd15"}
INITIALIZATIONS = ("informed", "random")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DistillOptions:
    """The inputs of the settings node, by their names; `positive` holds CONDITIONINGs.

    Values are checked where they are used.
    """

    recipe: "Recipe | None" = None
    start: "DeltaConvWeights | None" = None
    positive: Sequence[Any] = field(default_factory=list)
    unconditional: Sequence[Any] | None = None
    kernels: str = KERNELS[0]
    layer_steps: int = 300
    joint_steps: int = 300
    batch_size: int = 8
    layer_rate: float = 1e-3
    joint_rate: float = 3e-4
    seed: int = 0
    losses: str = "ours"
    min_snr: float = 0.0
    initialization: Literal["informed", "random"] = "informed"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = True
    accumulate: int = 1
    eight_bit: bool = False
    samples: int = 64
    sample_size: int = 0
    samples_mb: int = 1024
    save_every: int = 100
    preview_every: int = 100
