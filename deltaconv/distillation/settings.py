"""What a distillation is told: stages, rates, losses; read from plain data, refused by name."""

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import get_args, get_origin, get_type_hints

from ..block import DeltaConvBlock
from ..geometry import check_geometry, default_scales

INITS = ("informed", "random")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")
LOSSES = ("noise", "teacher", "features", "normalised_features")
DECAYED = ("all", "linear")


class DistillationError(ValueError):
    """A distillation that cannot start or go on; the message says what to do."""


@dataclass(frozen=True)
class StageSettings:
    """One training stage; 0 `steps` leave it out. A `batch` is computed in `accumulate` parts."""

    steps: int = 0
    lr: float = 3e-3
    schedule: str = "cosine"
    warmup: int = 20
    batch: int = 8
    accumulate: int = 1
    clip: float = 1.0
    weight_decay: float = 0.0
    # What weight_decay acts on: every tensor, or the weights of Linears without biases and kernels.
    decayed: str = "all"
    betas: tuple[float, ...] = (0.9, 0.99)
    # Least-squares refits of conv_out and conv_pool at the end of `layers`.
    refit: bool = False


@dataclass(frozen=True)
class DistillationSettings:
    """All settings of a distillation; `from_mapping` reads them from plain data."""

    init: str = "informed"
    # Images of the teacher's activations that the initialization and refits regress on.
    init_images: int = 128
    layers: StageSettings = field(default_factory=StageSettings)
    joint: StageSettings = field(default_factory=StageSettings)
    # Weight by loss name, for the joint stage.
    losses: Mapping[str, float] = field(default_factory=lambda: {"teacher": 1.0})
    # γ of Min-SNR weighting of the noise and teacher losses; 0 leaves it out.
    min_snr: float = 0.0
    # Share of the images on stored trajectory points, where the data has any.
    trajectory_share: float = 0.5
    unconditional: float = 0.1
    ema: float = 0.99
    precision: str = "float32"
    checkpointing: bool = False
    eight_bit: bool = False
    seed: int = 0
    save_every: int = 100
    # Steps with a non-finite loss in a row: after how many the rate halves, and the run stops.
    lower_after: int = 3
    stop_after: int = 10

    def __post_init__(self):
        problems = [
            _one_of("init", self.init, INITS),
            _one_of("precision", self.precision, PRECISIONS),
            _between("init_images", self.init_images, 2, 1_000_000),
            _between("min_snr", self.min_snr, 0, 1e6),
            _between("trajectory_share", self.trajectory_share, 0, 1),
            _between("unconditional", self.unconditional, 0, 1),
            _between("ema", self.ema, 0, 1, open_end=True),
            _between("seed", self.seed, 0, 2**64 - 1),
            _between("save_every", self.save_every, 1, 10**9),
            _between("lower_after", self.lower_after, 1, 10**6),
            _between("stop_after", self.stop_after, 1, 10**6),
        ]
        for name in ("layers", "joint"):
            problems += _stage_problems(name, getattr(self, name))
        for name, weight in self.losses.items():
            problems.append(_one_of("a loss", name, LOSSES))
            problems.append(_between(f"losses.{name}", weight, 0, 1e6))
        if self.joint.steps and not any(self.losses.values()):
            problems.append("losses: expected one with a weight above 0 for the joint stage")
        if problems := [problem for problem in problems if problem]:
            raise DistillationError(
                "These distillation settings cannot be: " + "; ".join(problems) + "."
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> "DistillationSettings":
        """Settings from plain data, as YAML or JSON give it; missing entries keep their defaults.

        Raises DistillationError that names every unknown entry and every value of the wrong kind.
        """
        return _read(cls, mapping, "")

    def to_mapping(self) -> dict[str, object]:
        """Plain data from which `from_mapping` makes the same settings."""
        plain = asdict(self)
        plain["losses"] = dict(self.losses)
        for name in ("layers", "joint"):
            plain[name]["betas"] = list(plain[name]["betas"])
        return plain

    def matches(self, plain: object) -> bool:
        """Whether plain data says the same; an older one lacks entries that were added since."""
        try:
            return DistillationSettings.from_mapping(plain) == self
        except (DistillationError, OverflowError):
            return False


@dataclass(frozen=True)
class SitePlan:
    """The block that one site gets; `biased` are the scales whose convolution has a bias."""

    kernel: int
    scales: tuple[float, ...] = (1.0, 0.5)
    biased: tuple[int, ...] = ()


def read_plan(recipe: Mapping[str, object], dims: Mapping[str, int]) -> dict[str, SitePlan]:
    """Site → (kernel, scales), a SitePlan, or a kernel alone → plans, in the model's site order.

    `dims` maps the model's sites to channels. Raises DistillationError that lists what cannot be.
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
        try:
            plan = _site_plan(entry)
        except (TypeError, ValueError) as error:
            problems.append(f"{site}: {error}")
            continue
        problems += [f"{site}: {line}" for line in check_geometry(dims[site], plan.kernel)]
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
    plans: Mapping[str, SitePlan], dims: Mapping[str, int], gate: str
) -> dict[str, DeltaConvBlock]:
    """Untrained blocks by site, from torch's current random state."""
    return {
        site: DeltaConvBlock(dims[site], plan.kernel, plan.scales, gate, biased=plan.biased)
        for site, plan in plans.items()
    }


def _site_plan(entry: object) -> SitePlan:
    kernel, scales = entry, default_scales(2)
    if isinstance(entry, SitePlan):
        kernel, scales = entry.kernel, entry.scales
    elif isinstance(entry, list | tuple):
        if len(entry) != 2:
            raise ValueError(f"expected [kernel, [scales]], got {entry!r:.80}")
        kernel, scales = entry
    if isinstance(kernel, bool) or not isinstance(kernel, int) or not 1 <= kernel <= 63:
        raise ValueError(f"expected an odd kernel from 1 to 63, got {kernel!r:.40}")
    if not isinstance(scales, list | tuple) or not 1 <= len(scales) <= 8:
        raise ValueError(f"expected 1 to 8 scales in (0, 1], got {scales!r:.80}")
    if not all(_is_number(scale) and 0 < scale <= 1 for scale in scales):
        raise ValueError(f"expected scales in (0, 1], got {scales!r:.80}")
    return SitePlan(kernel, tuple(float(scale) for scale in scales))


def _stage_problems(name: str, stage: StageSettings) -> list[str]:
    return [
        _between(f"{name}.steps", stage.steps, 0, 10**8),
        _between(f"{name}.lr", stage.lr, 1e-12, 10),
        _one_of(f"{name}.schedule", stage.schedule, SCHEDULES),
        _between(f"{name}.warmup", stage.warmup, 0, 10**8),
        _between(f"{name}.batch", stage.batch, 1, 10**5),
        _between(f"{name}.accumulate", stage.accumulate, 1, stage.batch),
        _between(f"{name}.clip", stage.clip, 1e-12, 1e12),
        _between(f"{name}.weight_decay", stage.weight_decay, 0, 10),
        _one_of(f"{name}.decayed", stage.decayed, DECAYED),
        "" if len(stage.betas) == 2 else f"{name}.betas: expected two, got {stage.betas!r:.60}",
        *(_between(f"{name}.betas", beta, 0, 1, open_end=True) for beta in stage.betas),
    ]


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    return "" if value in choices else f"{name}: expected one of {choices}, got {value!r:.40}"


def _between(name: str, value: float, low: float, high: float, *, open_end: bool = False) -> str:
    if math.isfinite(value) and low <= value <= high and not (open_end and value == high):
        return ""
    bounds = f"{low:g} {'≤' if not open_end else '≤ … <'} {high:g}"
    return f"{name}: expected a number, {bounds}, got {value!r:.40}"


def _read(cls: type, mapping: object, prefix: str):
    if not isinstance(mapping, Mapping):
        raise DistillationError(
            f"Expected {prefix or 'settings'} as entries by name, got {mapping!r:.60}."
        )
    hints = get_type_hints(cls)
    known = {entry.name for entry in fields(cls)}
    problems = [f"unknown: {prefix}{name!s:.40}" for name in mapping if name not in known]
    values = {}
    for name in known & set(mapping):
        value, hint = mapping[name], hints[name]
        if hint is StageSettings:
            values[name] = _read(StageSettings, value, f"{name}.")
        elif _fits(value, hint):
            values[name] = tuple(map(float, value)) if get_origin(hint) is tuple else value
        else:
            kind = "numbers" if get_origin(hint) else hint.__name__
            problems.append(f"{prefix}{name}: expected {kind}, got {value!r:.40}")
    if problems:
        raise DistillationError(
            "These distillation settings cannot be read: " + "; ".join(problems) + "."
        )
    return cls(**values)


def _fits(value: object, hint: object) -> bool:
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(map(_is_number, value))
    if get_args(hint) and not isinstance(hint, types.UnionType):
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and _is_number(number) for key, number in value.items()
        )
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
