"""Distillation settings: stages, optimizer, losses, validation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Annotated, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass as validated
from pydantic_core import PydanticCustomError

from ..block import DeltaConvBlock
from ..geometry import BlockPlan, check_geometry
from .validation import Bool, Count, Float, Int, Share, problems_of

StageName: TypeAlias = Literal["layers", "joint"]
Init: TypeAlias = Literal["informed", "random"]
Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
Loss: TypeAlias = Literal["noise", "teacher", "guided", "features", "normalised_features"]
Decayed: TypeAlias = Literal["all", "linear"]

_Beta: TypeAlias = Annotated[Float, Field(ge=0, lt=1)]
_T = TypeVar("_T")


class DistillationError(ValueError):
    """A distillation that cannot start or go on; the message says what to do."""


def _two(values: object) -> object:
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise PydanticCustomError("not_two", "Input should be two numbers")
    return values


@dataclass(frozen=True)
class StageSettings:
    """One training stage; 0 `steps` leave it out. A `batch` is computed in `accumulate` parts.

    Checked as a part of DistillationSettings, which names the stage.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", revalidate_instances="always")

    steps: Annotated[Count, Field(le=10**8)] = 0
    lr: Annotated[Float, Field(ge=1e-12, le=10)] = 3e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Annotated[Count, Field(le=10**8)] = 20
    batch: Annotated[Int, Field(ge=1, le=10**5)] = 8
    accumulate: Annotated[Int, Field(ge=1)] = 1
    # Updates for every pass of the teacher. Above 1 its last passes are kept, as many as fit into
    # `kept_gib`, and updates go over them again.
    updates: Annotated[Int, Field(ge=1, le=10_000)] = 1
    clip: Annotated[Float, Field(ge=1e-12, le=1e12)] = 1.0
    weight_decay: Annotated[Float, Field(ge=0, le=10)] = 0.0
    # What weight_decay acts on: every tensor, or the weights of Linears without biases and kernels.
    decayed: Decayed = "all"
    betas: Annotated[tuple[_Beta, _Beta], BeforeValidator(_two)] = (0.9, 0.99)
    # Least-squares refits of conv_out and conv_pool at the end of `layers`.
    refit: Bool = False

    @field_validator("accumulate")
    @classmethod
    def _at_most_the_batch(cls, accumulate: int, info: ValidationInfo) -> int:
        batch = info.data.get("batch", accumulate)
        if accumulate > batch:
            raise PydanticCustomError(
                "above_batch", "Input should be at most the batch, {batch}", {"batch": batch}
            )
        return accumulate


def _refusing(settings: type[_T]) -> type[_T]:
    """The class with a constructor that raises DistillationError in place of pydantic's error."""
    check: Callable[..., None] = settings.__init__

    @wraps(check)
    def init(self, *args, **kwargs):
        try:
            check(self, *args, **kwargs)
        except ValidationError as error:
            raise DistillationError(
                f"These distillation settings cannot be: {'; '.join(problems_of(error))}."
            ) from None

    settings.__init__ = init
    return settings


@_refusing
@validated(frozen=True, config=ConfigDict(extra="forbid"))
class DistillationSettings:
    """All settings of a distillation; `from_mapping` reads them from plain data.

    Raises DistillationError that names every unknown entry and every wrong value.
    """

    init: Init = "informed"
    # Images of the teacher's activations that the initialization and refits regress on.
    init_images: Annotated[Int, Field(ge=2, le=1_000_000)] = 128
    # Main memory for the teacher's last passes, of all processes together (passes.py).
    kept_gib: Annotated[Float, Field(ge=0, le=10_000)] = 2.0
    layers: StageSettings = field(default_factory=StageSettings)
    joint: StageSettings = field(default_factory=StageSettings)
    # Weight by loss name, for the joint stage.
    losses: Mapping[Loss, Annotated[Float, Field(ge=0, le=1e6)]] = field(
        default_factory=lambda: {"teacher": 1.0}
    )
    # Classifier-free guidance that the guided loss is computed at.
    guidance: Annotated[Float, Field(ge=1, le=100)] = 4.0
    # γ of Min-SNR weighting of the noise, teacher and guided losses; 0 leaves it out.
    min_snr: Annotated[Float, Field(ge=0, le=1e6)] = 0.0
    # Share of the images on stored trajectory points, where the data has any.
    trajectory_share: Share = 0.5
    unconditional: Share = 0.1
    # Share of sampling, from the noisiest step on, in which attention stays: not trained for.
    start: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    # How many times as often images are drawn at the first step of sampling as at the last: an
    # error there grows until the end.
    growth: Annotated[Float, Field(ge=1, le=1e6)] = 1.0
    ema: Annotated[Float, Field(ge=0, lt=1)] = 0.99
    precision: Precision = "float32"
    checkpointing: Bool = False
    eight_bit: Bool = False
    seed: Annotated[Count, Field(le=2**64 - 1)] = 0
    save_every: Annotated[Int, Field(ge=1, le=10**9)] = 100
    # Steps with a non-finite loss in a row: after how many the rate halves, and the run stops.
    lower_after: Annotated[Int, Field(ge=1, le=10**6)] = 3
    stop_after: Annotated[Int, Field(ge=1, le=10**6)] = 10

    @field_validator("losses")
    @classmethod
    def _one_for_the_joint_stage(
        cls, losses: Mapping[Loss, float], info: ValidationInfo
    ) -> Mapping[Loss, float]:
        joint = info.data.get("joint")
        if joint and joint.steps and not any(losses.values()):
            raise PydanticCustomError(
                "no_loss", "Input should be one with a weight above 0 for the joint stage"
            )
        return losses

    def stage(self, name: StageName) -> StageSettings:
        """The settings of one stage."""
        return self.layers if name == "layers" else self.joint

    def unguided(self) -> "DistillationSettings":
        """The same for a model without an empty prompt: the teacher loss for the guided one."""
        losses = dict(self.losses)
        guided = losses.pop("guided", 0.0)
        if guided:
            losses["teacher"] = losses.get("teacher", 0.0) + guided
        return replace(self, unconditional=0.0, losses=losses)

    @classmethod
    def from_mapping(cls, mapping: object) -> "DistillationSettings":
        """Settings from plain data, as YAML or JSON give it; missing entries keep their defaults.

        Raises DistillationError as the constructor does, and where it is no mapping.
        """
        if not isinstance(mapping, Mapping):
            raise DistillationError(f"Expected settings as entries by name, got {mapping!r:.60}.")
        return cls(**{str(name): value for name, value in mapping.items()})

    def to_mapping(self) -> dict[str, object]:
        """Plain data from which `from_mapping` makes the same settings."""
        return TypeAdapter(DistillationSettings).dump_python(self, mode="json")

    def matches(self, plain: object) -> bool:
        """Whether plain data says the same; an older one lacks entries that were added since."""
        try:
            return DistillationSettings.from_mapping(plain) == self
        except DistillationError:
            return False


def _listed(value: object) -> object:
    """Lists and tuples alone: a set has no order, and an iterator only one use."""
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("tuple_type", "Input should be a list")
    return value


@validated(frozen=True)
class _Entry:
    """A recipe's entry for one site; that the kernel is odd is checked with the site's dim."""

    kernel: Annotated[Int, Field(ge=1, le=63)]
    scales: Annotated[
        tuple[Annotated[Float, Field(gt=0, le=1)], ...],
        Field(min_length=1, max_length=8),
        BeforeValidator(_listed),
    ]
    heads: Annotated[Count, Field(le=4096)] = 0


_ENTRY = TypeAdapter(_Entry)


def read_plan(recipe: Mapping[str, object], dims: Mapping[str, int]) -> dict[str, BlockPlan]:
    """Site → (kernel, scales), a BlockPlan, or a kernel alone → plans, in the model's site order.

    Behind the scales may stand heads, of pooled tokens. `dims` maps the model's sites to
    channels. Raises DistillationError that lists what cannot be.
    """
    plans, problems = {}, []
    if not isinstance(recipe, Mapping) or not recipe:
        raise DistillationError(
            f"Expected a recipe of site → kernel and scales, got {recipe!r:.80}."
        )
    for site, entry in recipe.items():
        if site not in dims:
            problems.append(f"{site!r:.80} is no self-attention site of this model")
            continue
        if isinstance(entry, list | tuple) and len(entry) not in (2, 3):
            problems.append(
                f"{site}: expected [kernel, [scales]] or [kernel, [scales], heads], got "
                f"{entry!r:.80}"
            )
            continue
        try:
            plan = _block_plan(entry)
        except ValidationError as error:
            problems += [f"{site}: {line}" for line in problems_of(error)]
            continue
        problems += [
            f"{site}: {line}" for line in check_geometry(dims[site], plan.kernel, plan.heads)
        ]
        plans[site] = plan
    if problems:
        raise DistillationError(
            "This recipe does not fit the model: " + "; ".join(problems[:8]) + "."
        )
    return {site: plans[site] for site in dims if site in plans}


def default_kernels(levels: Mapping[str, int]) -> dict[str, int]:
    """Site → resolution level to site → kernel: 11 at the highest resolution, then 9, then 7."""
    return {site: max(7, 11 - 2 * level) for site, level in levels.items()}


def new_blocks(
    plans: Mapping[str, BlockPlan], dims: Mapping[str, int], gate: str
) -> dict[str, DeltaConvBlock]:
    """Untrained blocks by site, from torch's current random state."""
    return {
        site: DeltaConvBlock(
            dims[site], plan.kernel, plan.scales, gate, biased=plan.biased, heads=plan.heads
        )
        for site, plan in plans.items()
    }


def _block_plan(entry: object) -> BlockPlan:
    """The plan of a checked entry; raises ValidationError for any other."""
    biased: tuple[int, ...] = ()
    heads: object = 0
    if isinstance(entry, BlockPlan):
        kernel, scales, biased, heads = entry.kernel, entry.scales, entry.biased, entry.heads
    else:
        given = entry if isinstance(entry, list | tuple) else (entry, BlockPlan.scales)
        kernel, scales, *more = given
        heads = more[0] if more else 0
    checked = _ENTRY.validate_python({"kernel": kernel, "scales": scales, "heads": heads})
    return BlockPlan(checked.kernel, checked.scales, biased, checked.heads)
