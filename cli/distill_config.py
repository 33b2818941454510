"""The configuration of `deltaconv distill`: a YAML file, checked before anything is loaded."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..deltaconv.distillation import PRESETS, DistillationSettings
from ..deltaconv.distillation.plan import with_steps
from . import CommandError


class Configuration(BaseModel):
    """What to distill; the command's --help says what each entry means."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = "demo"
    data: str = "demo"
    prompts: list[Any] = []
    samples: int = Field(64, ge=1, le=10**6)
    size: int | None = Field(None, ge=1, le=10**6)
    recipe: dict[Any, Any] = {}
    kernels: Literal["by size", "5 and pooled tokens"] = "by size"
    start: str | None = None
    choice: Literal["balanced", "faithful", "fastest"] = "balanced"
    minutes: float | None = Field(None, gt=0, le=10**6, allow_inf_nan=False)
    gate: Literal["scaled", "sigmoid"] = "scaled"
    preset: Literal[tuple(PRESETS)] = "default"
    settings: dict[Any, Any] = {}
    folder: str = "output/distill"
    buckets: bool = False
    corrupt: float = Field(0.0, ge=0, lt=1)
    store: str | None = None
    workers: int = Field(0, ge=0, le=1024)
    tensorboard: bool = False
    pictures_every: int = Field(500, ge=0, le=10**8)
    stall: float = Field(600.0, ge=1, le=10**6, allow_inf_nan=False)


def read_configuration(path: Path | None) -> Configuration:
    """The entries of a YAML file. Raises CommandError that lists every one that is wrong."""
    if path is None:
        return Configuration()
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    # ValueError: a date that is none, a number of too many digits, text that is not UTF-8.
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise CommandError(
            f"Expected a YAML file at {path}, got: {error}. Correct it, or leave --config out to "
            "distill the packaged demo."
        ) from error
    if not isinstance(entries, dict):
        raise CommandError(f"Expected entries by name in {path}, got {entries!r:.60}.")
    unknown = [f"unknown entry {name!r:.40}" for name in entries if not isinstance(name, str)]
    try:
        found = Configuration(**{name: entries[name] for name in entries if isinstance(name, str)})
    except ValidationError as error:
        unknown += map(_phrase, error.errors())
    if unknown:
        raise CommandError(f"{path} cannot be used: {'; '.join(unknown)}.")
    return found


def _phrase(error: Any) -> str:
    name, got = error["loc"][0], error["input"]
    if error["type"] == "extra_forbidden":
        return f"unknown entry {name!r:.40}"
    number = " a number" if isinstance(got, int | float) and "than" in error["msg"] else ""
    expected = error["msg"].replace("Input should be", f"expected{number}", 1)
    return f"{name}: {expected}, got {got!r:.40}"


def chosen_settings(configuration: Configuration) -> DistillationSettings:
    """The preset with the configuration's own settings on top; no steps where minutes are."""
    preset = configuration.preset
    blocks = configuration.recipe or configuration.start
    if preset == "default" and configuration.kernels != "by size" and not blocks:
        preset = "tokens"
    mapping = PRESETS[preset]().to_mapping()
    for name, value in configuration.settings.items():
        nested = isinstance(value, dict) and name in ("layers", "joint")
        mapping[name] = {**mapping[name], **value} if nested else value
    settings = DistillationSettings.from_mapping(mapping)
    return settings if configuration.minutes is None else with_steps(settings, 0, 0)
