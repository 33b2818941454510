"""Captioned pictures from a folder or from WebDataset shards, in numbered parts.

A part is what one process reads at a time: 256 files of a folder, or one shard. Parts depend on the
data alone, so that any number of processes may share them.
"""

import glob
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..distillation.settings import DistillationError

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_FILES_OF_A_PART = 256
# Fewer items say nothing of the share that is corrupt.
_ENOUGH = 100


@dataclass(frozen=True)
class Item:
    """A picture and its caption; `read` raises OSError or ValueError where it is corrupt."""

    name: str
    read: Callable[[], tuple["Image", str]]


class Pictures:
    """Numbered parts of items; `digest` tells one set from another."""

    parts: int
    digest: str

    def items(self, part: int) -> Iterator[Item]:
        """The items of a part, in an order that is always the same."""
        raise NotImplementedError


class FolderPictures(Pictures):
    """Pictures in a folder and those below it, each with a .txt of its caption beside it."""

    def __init__(self, folder: Path):
        self.folder = folder
        found = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
        self.files = sorted(path.relative_to(folder).as_posix() for path in found)
        if not self.files:
            raise DistillationError(
                f"Expected pictures ({', '.join(ENDINGS)}) in {folder}, got none."
            )
        self.parts = -(-len(self.files) // _FILES_OF_A_PART)
        self.digest = hashlib.sha256("\n".join(self.files).encode()).hexdigest()[:16]

    def items(self, part: int) -> Iterator[Item]:
        """The items of a part, by their paths."""
        for name in self.files[part * _FILES_OF_A_PART :][:_FILES_OF_A_PART]:
            yield Item(name, lambda file=self.folder / name: _read_file(file))


class ShardPictures(Pictures):
    """Samples of WebDataset shards: tar files with a picture and a .txt under one name.

    A shard that breaks off counts as one corrupt item.
    """

    def __init__(self, shards: list[Path]):
        self.shards, self.parts = shards, len(shards)
        listed = "\n".join(f"{shard.name} {shard.stat().st_size}" for shard in shards)
        self.digest = hashlib.sha256(listed.encode()).hexdigest()[:16]

    def items(self, part: int) -> Iterator[Item]:
        """The samples of a shard, in their order."""
        import webdataset

        shard, broken = self.shards[part], []

        def note(error: Exception) -> bool:
            broken.append(error)
            # Nothing behind it can be found.
            return False

        # WebDataset itself would take a path with a colon or a brace for something else.
        with open(shard, "rb") as stream:
            source = [{"url": shard.name, "stream": stream}]
            files = webdataset.tariterators.tar_file_expander(source, handler=note)
            for sample in webdataset.tariterators.group_by_keys(files, handler=note):
                yield Item(
                    f"{shard.name}/{sample['__key__']}", lambda one=sample: _read_sample(one)
                )
        if broken:
            error = OSError(f"the shard breaks off: {broken[0]!s:.120}")
            yield Item(f"{shard.name} (its end)", lambda: _raise(error))


def pictures_of(data: str) -> Pictures:
    """The pictures that an entry `data` names: a folder, a .tar, or a pattern of them.

    Patterns may have braces, as in shards/{000..123}.tar, or * and ?. Raises DistillationError
    where there are none.
    """
    if Path(data).is_dir():
        folder = Path(data)
        shards = sorted(folder.glob("*.tar"))
        return ShardPictures(shards) if shards else FolderPictures(folder)
    if not data.endswith(".tar"):
        raise DistillationError(
            f"Expected a folder of pictures, or .tar shards, got {data}, which is neither."
        )
    from braceexpand import braceexpand

    found: list[Path] = []
    for name in braceexpand(data):
        matching = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        found += map(Path, matching)
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise DistillationError(
            f"Expected shards at {data}, got {'none' if not found else f'no {missing[0]}'}."
        )
    return ShardPictures(found)


@dataclass
class Corruption:
    """Which items could not be read; more than `share` of them are refused."""

    share: float
    items: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    def read(self, item: Item) -> tuple["Image", str] | None:
        """The picture and caption of an item; None where it is corrupt, which is counted."""
        self.items += 1
        try:
            return item.read()
        except (OSError, ValueError, SyntaxError) as error:
            # Pillow raises SyntaxError for some broken PNGs.
            self.skipped[item.name] = f"{error!s:.200}"
        if not self.share or self.items >= _ENOUGH:
            self.check()
        return None

    def check(self) -> None:
        """Raise DistillationError, with names, where more than the share are corrupt."""
        if len(self.skipped) > self.share * self.items:
            named = "; ".join(f"{name}: {why}" for name, why in list(self.skipped.items())[-3:])
            raise DistillationError(
                f"Expected at most {self.share:.2%} of the items to be corrupt, got "
                f"{len(self.skipped)} of {self.items}. Cannot use {named}. Remove or replace them, "
                "or allow a larger share with the entry corrupt."
            )

    def __str__(self) -> str:
        return f"{len(self.skipped)} of {self.items} items are corrupt and skipped"


def _read_file(file: Path) -> tuple["Image", str]:
    caption = file.with_suffix(".txt")
    text = caption.read_text(encoding="utf-8").strip() if caption.exists() else ""
    return _decoded(file.read_bytes()), text


def _read_sample(sample: dict) -> tuple["Image", str]:
    found = [name for name in sample if f".{name.lower()}" in ENDINGS]
    if not found:
        raise ValueError(f"no picture, but {', '.join(n for n in sample if n[:2] != '__')}")
    return _decoded(sample[found[0]]), sample.get("txt", b"").decode("utf-8").strip()


def _decoded(content: bytes) -> "Image":
    from PIL import Image

    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _raise(error: Exception):
    raise error
