"""States that any number of processes writes together and any other number takes up.

A state is a folder `state-<steps>-<save>`: in `training/` its tensors as torch's distributed
checkpoint, in safetensors files, each process a part of them; `deltaconv.safetensors`, which Apply
ΔConv loads; and `state.json` with progress, identity and the digest of every file. It gets its name
when it is whole.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from ..distillation.checkpoint import (
    Checkpoints,
    State,
    load_state,
    saved_steps,
    taken_up,
)
from ..distillation.settings import DistillationError
from ..weights.file import write_weights
from ..weights.model import DeltaConvWeights

FORMAT = "1"
WEIGHTS, TRAINING = "deltaconv.safetensors", "training"
_RECORD = "state.json"
_NAME = re.compile(r"state-(\d{8,})-(\d{3,})")
_KEPT = 2
_T = TypeVar("_T")


class Processes:
    """Those that write a state together: here this one alone."""

    count, rank, main = 1, 0, True

    def wait(self) -> None:
        """Until all processes are here."""

    def gather(self, value: _T) -> list[_T]:
        """`value` of every process, in their order."""
        return [value]


def sharded_states(folder: Path) -> list[Path]:
    """The state folders in `folder`, newest first; [] where there is none."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    number, save = path.name.split("-")[1:]
    return int(number), int(save)


class ShardedCheckpoints(Checkpoints):
    """The states of one run in `folder`, which all processes see; none where that is None.

    A state of the command in one process is taken up too, where it is the newest.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: Mapping[str, object],
        processes: Processes | None = None,
    ):
        super().__init__(folder, identity)
        self.processes: Processes = processes or Processes()

    def refuse_states(self) -> None:
        """Raise DistillationError where the folder holds a state."""
        super().refuse_states()
        if self.folder and sharded_states(self.folder):
            raise DistillationError(
                f"Expected a folder without states, got {self.folder} with a distillation in it. "
                "Allow resuming to go on with it, or choose another folder."
            )

    def load(self, shapes: Mapping[str, tuple[int, ...]]) -> State | None:
        """The newest readable state, of whatever number of processes; see `load_state`."""
        state = self._newest(shapes) if self.folder else None
        # All must have read it before one of them removes older ones.
        self.processes.wait()
        self.saved = state.progress.number if state else None
        return state

    def _newest(self, shapes: Mapping[str, tuple[int, ...]]) -> State | None:
        assert self.folder is not None
        damaged = []
        single = saved_steps(self.folder)
        for path in sharded_states(self.folder):
            if single is not None and single > _order(path)[0]:
                break
            try:
                tensors, record = _read(path)
                progress, identity = record["progress"], record["identity"]
                return taken_up(path, tensors, progress, identity, self.identity, shapes)
            except DistillationError:
                raise
            except (
                OSError,
                KeyError,
                TypeError,
                ValueError,
                RuntimeError,
                RecursionError,
            ) as error:
                damaged.append(f"{path.name} ({error!s:.80})")
        if single is not None:
            return load_state(self.folder, self.identity, shapes)
        if damaged:
            raise DistillationError(
                f"Expected a readable state in {self.folder}, got {len(damaged)} damaged: "
                f"{'; '.join(damaged)}. Delete them to begin anew, or choose another folder."
            )
        return None

    def save(self, state: State, weights: Callable[[], DeltaConvWeights] | None = None) -> str:
        """Write `state` with the file of `weights`, all processes together; returns its path."""
        if self.folder is None or self.saved == state.progress.number:
            return ""
        path = self._save(self.folder, state, weights)
        self.saved = state.progress.number
        return str(path)

    def _save(
        self, folder: Path, state: State, weights: Callable[[], DeltaConvWeights] | None
    ) -> Path:
        number, processes = state.progress.number, self.processes
        before = [_order(path)[1] for path in sharded_states(folder) if _order(path)[0] == number]
        path = folder / f"state-{number:08d}-{max(before, default=0) + 1:03d}"
        part = folder / f".{path.name}.part"
        if processes.main:
            # What a killed run left.
            for left in folder.glob(".state-*.part"):
                shutil.rmtree(left, ignore_errors=True)
            (part / TRAINING).mkdir(parents=True)
        processes.wait()
        _write_tensors(part / TRAINING, state.tensors, alone=processes.count == 1)
        mine = {
            f"{TRAINING}/{file.name}": _digest(file, flush=True)
            for file in _files_of(part / TRAINING, processes.rank)
        }
        digests = {name: digest for one in processes.gather(mine) for name, digest in one.items()}
        if processes.main:
            if weights:
                write_weights(weights(), part / WEIGHTS)
                digests[WEIGHTS] = _digest(part / WEIGHTS)
            record = {
                "format": FORMAT,
                "identity": self.identity,
                "progress": asdict(state.progress),
                "files": digests,
            }
            record["digest"] = _digest_of(record)
            (part / _RECORD).write_text(json.dumps(record), encoding="utf-8")
            _digest(part / _RECORD, flush=True)
            part.rename(path)
            # States with a higher number are damaged: this run would have resumed from them.
            earlier = [old for old in sharded_states(folder) if _order(old) <= _order(path)]
            for old in earlier[_KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
        processes.wait()
        return path


def _write_tensors(part: Path, tensors: Mapping[str, torch.Tensor], alone: bool) -> None:
    import torch.distributed.checkpoint as dcp

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
    with _one_process_is_meant():
        dcp.save(state, storage_writer=writer, no_dist=alone)


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without torch's warning that there are no other processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _files_of(part: Path, rank: int) -> list[Path]:
    """The files that the process of this rank wrote; names count from 1."""
    return sorted(part.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A state's tensors and record. Raises ValueError where it is not as it was written."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"not a state of format {FORMAT}")
    if record.pop("digest", "") != _digest_of(record):
        raise ValueError("its record was changed after it was saved")
    for name, digest in record["files"].items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} was changed after it was saved")
    reader = dcp.HuggingFaceStorageReader(str(path / TRAINING))
    tensors: dict[str, torch.Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            tensors[name] = torch.zeros(stored.size, dtype=stored.properties.dtype)
    # Every process reads all of it: there is nothing to agree on.
    with _one_process_is_meant():
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors, record


def _digest(file: Path, flush: bool = False) -> str:
    """SHA-256 of a file, which the system has then written where `flush` says so."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
        if flush:
            os.fsync(opened.fileno())
    return digest.hexdigest()


def _digest_of(record: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
