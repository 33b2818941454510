"""The state folder of a distillation: whole files only, the last two of them, checked by name.

One file holds `weights.*`, `ema.*`, `optimiser.*`, `history` and `rng` as tensors, and as JSON
metadata the progress and the identity: recipe and fingerprint of the base. A digest over all of it
detects a changed file.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from safetensors import SafetensorError

from ..weights.file import LONGEST_RECORD, write_atomically
from ..weights.header import open_tensors, read_header
from ..weights.model import DeltaConvWeights
from ..whole_file import held, remove_unfinished
from .settings import DistillationError, StageName
from .validation import Count, Float, problems_of

FORMAT = "2"
_NAME = re.compile(r"state-(\d{8,})\.safetensors")
_KEPT = 2
# Held for as long as a run goes.
_RUNNING = ".running"


@validated(frozen=True)
class Progress:
    """How far a training has come; its fields are the saved names, in their order."""

    stage: StageName
    # Steps of this stage, draws from the data, steps of all stages.
    step: Count
    position: Count
    number: Count
    # Steps in the moving average.
    averaged: Count
    # The memory policy's factor.
    parts: Count
    # Non-finite steps in a row, and the guard's factor on the learning rate.
    bad: Count
    rate: Annotated[Float, Field(gt=0, le=1)]
    scaler: dict[str, Any]
    # Compared with those of the run that takes this up, and never read otherwise.
    settings: Any = None
    # What was chosen: the sites with blocks, None for all of the recipe, and the share of sampling
    # from which on they act.
    replaced: tuple[str, ...] | None = None
    start: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    # Whether this stage keeps passes for several updates; not from one on that did not fit.
    keeps: bool = True


_PROGRESS = TypeAdapter(Progress)


@dataclass(frozen=True)
class State:
    """Tensors by name, and the progress beside them."""

    tensors: Mapping[str, torch.Tensor]
    progress: Progress

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under `prefix.`, by the rest of their names."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def state_files(folder: Path) -> list[Path]:
    """The state files of a folder, newest first; [] where there is none."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=_number, reverse=True)


def saved_steps(folder: Path) -> int | None:
    """How many steps the newest state of a folder has behind it; None where there is none."""
    return next(map(_number, state_files(folder)), None)


def saved_seed(folder: Path) -> int | None:
    """The seed that the newest state of a folder was trained with; None where none says it."""
    for path in state_files(folder):
        try:
            seed = _record(read_header(path).metadata, "progress")["settings"]["seed"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
            continue
        if isinstance(seed, int):
            return seed
    return None


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("state-"))


class Checkpoints:
    """The states of one run in `folder`; nothing is saved where that is None.

    `identity` is what a resumed run must agree in: base and recipe.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, object]):
        self.folder, self.identity = folder, identity
        # Number of the state that was saved or loaded last.
        self.saved: int | None = None

    def refuse_states(self) -> None:
        """Raise DistillationError where the folder holds a state."""
        if self.folder and state_files(self.folder):
            raise DistillationError(
                f"Expected a folder without states, got {self.folder} with a distillation in it. "
                "Allow resuming to go on with it, or choose another folder."
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out of the folder; DistillationError where one is in it."""
        if self.folder is None:
            yield
            return
        with held(self.folder, _RUNNING, wait=False) as free:
            if not free:
                raise DistillationError(
                    f"Expected a folder that no other distillation is writing to, got "
                    f"{self.folder}. Wait for it, or choose another folder."
                )
            yield

    def load(self, shapes: Mapping[str, tuple[int, ...]]) -> State | None:
        """The newest readable state; see `load_state`."""
        state = load_state(self.folder, self.identity, shapes) if self.folder else None
        self.saved = state.progress.number if state else None
        return state

    def save(self, state: State, weights: Callable[[], DeltaConvWeights] | None = None) -> str:
        """Write `state`; returns its path, "" where it is saved already.

        `weights` makes the file that could be applied; a state alone does not need it.
        """
        if self.folder is None or self.saved == state.progress.number:
            return ""
        path = save_state(self.folder, state, self.identity)
        self.saved = state.progress.number
        return str(path)


def save_state(folder: Path, state: State, identity: Mapping[str, object]) -> Path:
    """Write the state whole, then remove all but it and the one before; returns its path.

    Raises WriteError where the disk is full or the folder may not be written to: what was there
    stays.
    """
    number = state.progress.number
    path = folder / f"state-{number:08d}.safetensors"
    metadata = {
        "deltaconv.state": FORMAT,
        "deltaconv.identity": json.dumps(identity, sort_keys=True),
        "deltaconv.progress": json.dumps(asdict(state.progress)),
    }
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.tensors.items()}
    metadata["deltaconv.digest"] = _digest(tensors, metadata)
    with held(folder):
        write_atomically(tensors, metadata, path, overwrite=True)
        # States with a higher number are damaged: this run would have resumed from them.
        earlier = [old for old in state_files(folder) if _number(old) <= number]
        for old in earlier[_KEPT:]:
            old.unlink(missing_ok=True)
        remove_unfinished(folder, "state-")
    return path


def load_state(
    folder: Path, identity: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> State | None:
    """The newest readable state of `folder`; None where it has none.

    `shapes` names the student's tensors. Raises DistillationError where the state belongs to
    another base or recipe, naming which, and where every file is damaged.
    """
    damaged = []
    for path in state_files(folder):
        try:
            tensors, metadata = _read(path)
            saved, plain = _record(metadata, "identity"), _record(metadata, "progress")
            return taken_up(path, tensors, plain, saved, identity, shapes)
        except DistillationError:
            raise
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
            damaged.append(f"{path.name} ({error!s:.80})")
    if damaged:
        raise DistillationError(
            f"Expected a readable state in {folder}, got {len(damaged)} damaged: "
            f"{'; '.join(damaged)}. Delete them to begin anew, or choose another folder."
        )
    return None


def taken_up(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    plain: object,
    saved: object,
    identity: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
) -> State:
    """The state at `path` from its tensors, its progress as plain data, and its `saved` identity.

    Raises DistillationError where that is not `identity`, ValueError where the state is damaged.
    """
    if not isinstance(saved, dict) or not isinstance(plain, dict):
        raise ValueError("its record is no record")
    _refuse_another(path, saved, identity)
    try:
        state = State(tensors, _PROGRESS.validate_python(plain))
    except ValidationError as error:
        raise ValueError(problems_of(error)[0]) from None
    if problem := _problem(state, _chosen(shapes, state.progress.replaced)):
        raise ValueError(problem)
    return state


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    # Refuses what is no file, and headers beyond what any file of ours has.
    read_header(path)
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("deltaconv.state") != FORMAT:
            raise ValueError(f"not a state of format {FORMAT}")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    if metadata.pop("deltaconv.digest", "") != _digest(tensors, metadata):
        raise ValueError("it was changed after it was saved")
    return tensors, metadata


def _record(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """What a state says under that name; ValueError, KeyError or RecursionError where it is none.

    SDXL's 70 sites take 8 000 characters.
    """
    text = metadata[f"deltaconv.{name}"]
    if len(text) > LONGEST_RECORD:
        raise ValueError(f"its {name} has more than {LONGEST_RECORD} characters")
    if not isinstance(found := json.loads(text), dict):
        raise ValueError(f"its {name} is no record")
    return found


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse_another(
    path: Path, saved: Mapping[str, object], identity: Mapping[str, object]
) -> None:
    expected = json.loads(json.dumps(identity))
    for name, value in expected.items():
        if saved.get(name) != value:
            raise DistillationError(
                f"Expected a state of this {name} in {path.parent}, got one of another: "
                f"{_difference(saved.get(name), value)}. Choose another folder, or go on with the "
                f"{name} that it was begun with."
            )


def _difference(saved: object, value: object) -> str:
    if isinstance(saved, dict) and isinstance(value, dict):
        names = [name for name in {**saved, **value} if saved.get(name) != value.get(name)]
        name = names[0] if names else ""
        return f"{name} was {saved.get(name)!r:.60} and is {value.get(name)!r:.60}"
    return f"it was {saved!r:.60} and is {value!r:.60}"


def _chosen(
    shapes: Mapping[str, tuple[int, ...]], replaced: tuple[str, ...] | None
) -> Mapping[str, tuple[int, ...]]:
    """The shapes of the tensors at the chosen sites."""
    if replaced is None:
        return shapes
    prefixes = tuple(f"{site}." for site in replaced)
    return {name: shape for name, shape in shapes.items() if name.startswith(prefixes)}


def _problem(state: State, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why this state cannot be taken up, "" where it can."""
    for group in ("weights", "ema"):
        tensors = state.group(group)
        if {name: tuple(t.shape) for name, t in tensors.items()} != dict(shapes):
            return f"its {group} are not those of these blocks"
        if not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values()):
            return f"its {group} are not finite float32"
    rng = state.tensors.get("rng")
    if rng is None or rng.dtype != torch.uint8 or rng.shape != torch.Generator().get_state().shape:
        return "its random state is missing"
    history = state.tensors.get("history")
    expected = (state.progress.number,)
    if history is None or history.dtype != torch.float64 or tuple(history.shape) != expected:
        return "its losses are missing"
    return _moments_problem(state.group("optimiser"), shapes)


def eight_bit(moments: Mapping[str, torch.Tensor]) -> bool:
    """Whether an optimizer's moments are those of bitsandbytes."""
    return any(key.endswith(".state1") for key in moments)


def _moments_problem(
    moments: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    for key, tensor in moments.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"its optimizer is not finite in {key}"
    if not moments:
        return ""
    if eight_bit(moments):
        wanted = {f"{name}.state{n}": shape for name, shape in shapes.items() for n in (1, 2)}
        found = {key: tuple(moments[key].shape) for key in wanted if key in moments}
        steps = {f"{name}.step" for name in shapes}
        whole = found == wanted and steps <= moments.keys()
        return "" if whole else "its optimizer is not an eight-bit AdamW's"
    expected = {}
    for name, shape in shapes.items():
        expected |= {f"{name}.step": (), f"{name}.exp_avg": shape, f"{name}.exp_avg_sq": shape}
    found = {key: tuple(t.shape) for key, t in moments.items() if t.dtype == torch.float32}
    return (
        "" if found == expected and len(found) == len(moments) else "its optimizer is not AdamW's"
    )
