"""Precomputed latents with text conditioning, in Arrow files of Hugging Face's datasets.

A store is a folder: `store.json` says what it was made from, `part-<number>.arrow` holds the items
of a part and `part-<number>.json` how many they are and what was skipped; a part is whole when that
is there. An item is one row: name, caption, latent [C, H, W] in float16 with its size, and a
conditioning entry as safetensors. `unconditional.safetensors` is the entry of the empty prompt.

Of the two formats that the field trains from, MosaicML's streaming pins NumPy below 2.2 and
transformers below 5, which ComfyUI's own environment does not have; the base is loaded there.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ..distillation.data import Dataset
from ..distillation.order import EpochOrders
from ..distillation.settings import DistillationError

FORMAT = "1"
_RECORD, _EMPTY = "store.json", "unconditional.safetensors"
_PART = re.compile(r"part-(\d{6,})\.json")
# A conditioning entry: its tensor's name, and the metadata of its other values.
_CONTEXT, _PLAIN = "context", "deltaconv.plain"
Entry = tuple[torch.Tensor, dict[str, Any]]


@dataclass(frozen=True)
class StoredItem:
    """What is kept of one picture: latent [C, H, W] and an entry of conditioning."""

    name: str
    caption: str
    latent: torch.Tensor
    entry: Entry


class Store:
    """The folder of a store, for its writers. `identity` is what all of it was made from."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, identity: Mapping[str, object], unconditional: Entry) -> None:
        """Write what the store is made from; raises DistillationError where it is of another."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"format": FORMAT, **identity}
        path = self.folder / _RECORD
        if path.exists():
            found = read_record(self.folder)
            for name, value in json.loads(json.dumps(record)).items():
                if found.get(name) != value:
                    raise DistillationError(
                        f"Expected a store of this {name} in {self.folder}, got one of another: it "
                        f"was {found.get(name)!r:.60} and is {value!r:.60}. Choose another folder."
                    )
        _write(self.folder / _EMPTY, packed(unconditional))
        _write(path, json.dumps(record).encode())

    def done(self) -> dict[int, dict[str, Any]]:
        """Number → record of every part that is whole."""
        found = {}
        for path in self.folder.iterdir():
            if match := _PART.fullmatch(path.name):
                found[int(match[1])] = json.loads(path.read_text(encoding="utf-8"))
        return dict(sorted(found.items()))

    def write(self, part: int, items: Iterable[StoredItem], skipped: Mapping[str, str]) -> int:
        """Write a part whole → its number of items; `skipped` is read when these have come."""
        from datasets.arrow_writer import ArrowWriter

        path = self.folder / f"part-{part:06d}.arrow"
        temporary = path.with_suffix(f".{os.getpid()}.partial")
        count = 0
        try:
            with ArrowWriter(features=_features(), path=str(temporary)) as writer:
                for item in items:
                    writer.write(_row(item))
                    count += 1
                if count:
                    writer.finalize()
            if count:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        record = {"items": count, "skipped": dict(skipped)}
        _write(path.with_suffix(".json"), json.dumps(record).encode())
        return count


def is_store(folder: str | Path) -> bool:
    """Whether a folder is a store."""
    return (Path(folder) / _RECORD).is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """What a store was made from. Raises DistillationError where that cannot be read."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r:.20}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistillationError(
            f"Expected a store of format {FORMAT} in {folder}, got {error!s:.100}. Make it anew "
            "with deltaconv precompute."
        ) from None
    return record


class StoredData(Dataset):
    """A store as training data: items are read when they are drawn, `workers` processes ahead.

    `corrupt` is the share of the items that may have been skipped, `base` the fingerprint of the
    model to train on. Raises DistillationError where more were, a part is missing, or the store is
    of another model.
    """

    def __init__(self, folder: Path, *, base: str, corrupt: float = 0.0, workers: int = 0):
        record, parts = read_record(folder), Store(folder).done()
        if record["base"] != base:
            raise DistillationError(
                f"Expected a store of this model in {folder}, got one of another (its fingerprint "
                f"is {record['base']}, this one's {base}). Precompute for this model."
            )
        missing = [number for number in range(record["parts"]) if number not in parts]
        if missing:
            raise DistillationError(
                f"Expected {record['parts']} parts in {folder}, got {len(parts)}: number "
                f"{missing[0]} is missing. Run deltaconv precompute again; it goes on."
            )
        self.skipped = {
            name: why for part in parts.values() for name, why in part["skipped"].items()
        }
        total = sum(part["items"] for part in parts.values())
        if len(self.skipped) > corrupt * (total + len(self.skipped)):
            raise DistillationError(
                f"Expected at most {corrupt:.2%} of the items in {folder} to be corrupt, got "
                f"{len(self.skipped)} of {total + len(self.skipped)}. Allow more with the entry "
                "corrupt, or replace them and precompute anew."
            )
        if not total:
            raise DistillationError(f"Expected items in {folder}, got none.")
        files = [
            folder / f"part-{number:06d}.arrow" for number, one in parts.items() if one["items"]
        ]
        self.table = _Rows(files)
        self.workers = workers
        self.latents, self.conditions = _Column(self.table, 0), _Column(self.table, 1)
        self.unconditional = unpacked((folder / _EMPTY).read_bytes())
        self.trajectories = None
        self._orders = self._epochs = EpochOrders(self.table.sizes())
        self._ahead: Iterator[list[tuple[torch.Tensor, Entry]]] | None = None
        # What the last draw was of.
        self._last: tuple | None = None

    def __len__(self) -> int:
        return len(self.table)

    def images(
        self, seed: int, batch: int, position: int, rows: Sequence[int]
    ) -> tuple[list[int], list[torch.Tensor], list[Any]]:
        """Index, latent and condition of these rows of a draw, read ahead from the second on."""
        indices = self.indices(seed, batch, position)
        what = (seed, batch, tuple(rows))
        following = self._last == (what, position - 1)
        self._last = (what, position)
        if not (following and self.workers):
            self._ahead = None
            found = [self.table[indices[row]] for row in rows]
        else:
            if self._ahead is None:
                self._ahead = self._loader(seed, batch, position, rows)
            found = next(self._ahead)
        latents, entries = zip(*found, strict=True)
        return [indices[row] for row in rows], list(latents), list(entries)

    def _loader(
        self, seed: int, batch: int, position: int, rows: Sequence[int]
    ) -> Iterator[list[tuple[torch.Tensor, Entry]]]:
        """The draws from `position` on, in their order however many workers read them."""
        loader = torch.utils.data.DataLoader(
            self.table,
            batch_sampler=_Draws(self._epochs, seed, batch, position, rows),
            num_workers=self.workers,
            collate_fn=list,
        )
        return iter(loader)


class _Draws:
    """The rows of every draw from `position` on, without end.

    It does not hold the data, which holds what reads it ahead: these processes end with the data.
    """

    def __init__(
        self, orders: EpochOrders, seed: int, batch: int, position: int, rows: Sequence[int]
    ):
        self.orders, self.seed, self.batch = orders, seed, batch
        self.position, self.rows = position, rows

    def __iter__(self) -> Iterator[list[int]]:
        position = self.position
        while True:
            indices = self.orders.indices(self.seed, self.batch, position)
            yield [indices[row] for row in self.rows]
            position += 1


class _Rows(torch.utils.data.Dataset):
    """Item number → (latent, entry), read from the files where they lie."""

    def __init__(self, files: Sequence[Path]):
        from datasets import Dataset as Arrow
        from datasets import concatenate_datasets

        self.arrow = concatenate_datasets([Arrow.from_file(str(file)) for file in files])

    def __len__(self) -> int:
        return len(self.arrow)

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every latent."""
        columns = (self.arrow.data.column(name).to_pylist() for name in ("height", "width"))
        return list(zip(*columns, strict=True))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Entry]:
        row = self.arrow[int(index)]
        latent = torch.frombuffer(bytearray(row["latent"]), dtype=torch.float16)
        return latent.view(-1, row["height"], row["width"]).float(), unpacked(row["conditioning"])


class _Column(Sequence):
    """One of what each row of a table is."""

    def __init__(self, table: _Rows, which: int):
        self.table, self.which = table, which

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return self.table[index][self.which]


def packed(entry: Entry) -> bytes:
    """A conditioning entry as safetensors: tensors in float16 where that holds them."""
    tensors, plain = {_CONTEXT: _halved(entry[0])}, {}
    for name, value in entry[1].items():
        if isinstance(value, torch.Tensor):
            tensors[f"options.{name}"] = _halved(value)
        elif value is None or isinstance(value, str | int | float | bool):
            plain[name] = value
        else:
            raise DistillationError(
                f"Expected conditioning of tensors and plain values, got {type(value).__name__} as "
                f"{name}. Precomputing this model's conditioning is not built yet; train from the "
                "pictures."
            )
    return save(tensors, metadata={_PLAIN: json.dumps(plain)})


def unpacked(content: bytes) -> Entry:
    """The conditioning entry that `packed` wrote; floating-point tensors in float32."""
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in load(content).items()
    }
    options = json.loads(_metadata(content)[_PLAIN])
    for name, tensor in tensors.items():
        if name != _CONTEXT:
            options[name.removeprefix("options.")] = tensor
    return tensors[_CONTEXT], options


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of safetensors in memory: the header's length, then the header in JSON."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__", {})


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if half.isfinite().all() else tensor.float()


def _row(item: StoredItem) -> dict[str, Any]:
    latent = item.latent.detach().cpu().half().contiguous()
    if latent.ndim != 3 or not latent.isfinite().all():
        raise DistillationError(
            f"Expected finite latents [C, H, W], got {list(latent.shape)} for {item.name}."
        )
    return {
        "name": item.name,
        "caption": item.caption,
        "height": latent.shape[1],
        "width": latent.shape[2],
        "latent": latent.numpy().tobytes(),
        "conditioning": packed(item.entry),
    }


def _features():
    from datasets import Features, Value

    kinds = {"name": "string", "caption": "string", "height": "int32", "width": "int32"}
    kinds |= {"latent": "binary", "conditioning": "binary"}
    return Features({name: Value(kind) for name, kind in kinds.items()})


def _write(path: Path, content: bytes) -> None:
    """Write a file whole: readers and other processes see all of it or none."""
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
