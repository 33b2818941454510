"""Files of known entries that lie in a folder already, downloaded or put there by hand."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..messages import Say, english
from ..weights import WeightsError, read_weights
from .entries import Entry

# Called with (bytes done, bytes in all), (0, 0) while those are not known; may raise to interrupt.
Progress = Callable[[int, int], None]
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Found:
    """An entry's file, and what was found or done: a sentence of `messages` and its values."""

    path: Path
    said: str
    values: Mapping[str, object]

    def note(self, say: Say = english) -> str:
        """The sentence, in the language of `say`."""
        return say(self.said, path=self.path, **self.values)


def no_progress(done: int, total: int) -> None:
    """A Progress that nobody sees."""


def placed_path(entry: Entry, folders: Iterable[Path]) -> Path | None:
    """The entry's file in the first folder that has it; None if none has.

    It is known by its name. While a packaged entry has no name, the one file that holds the
    authors' blocks of its family is taken; raises ValueError where several do.
    """
    if not entry.file:
        return _by_content(entry, folders)
    paths = (folder / entry.file for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def find_placed(
    entry: Entry, folders: Iterable[Path], progress: Progress = no_progress
) -> Found | None:
    """The file of `placed_path` with what is to be said of it; None if there is none.

    Its hash is compared where the entry has one; a file with another hash is the user's, and is
    used.
    """
    path = placed_path(entry, folders)
    return Found(path, _found(entry, path, progress), {"repo": entry.repo}) if path else None


def file_digest(path: Path, progress: Progress):
    """The SHA-256 of a file's bytes so far, to be updated further."""
    digest = hashlib.sha256()
    done, size = 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(done, size)
    return digest


def _found(entry: Entry, path: Path, progress: Progress) -> str:
    if entry.sha256 is None:
        return "found, not compared"
    same = file_digest(path, progress).hexdigest() == entry.sha256
    return "found" if same else "found, another"


def _by_content(entry: Entry, folders: Iterable[Path]) -> Path | None:
    paths = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    found = [path for path in paths if _is_published(entry, path)]
    if len(found) > 1:
        raise ValueError(
            f"Expected one file with the authors' blocks for {entry.label}, got "
            f"{', '.join(map(str, found))}. Choose one with Load ΔConv Weights."
        )
    return found[0] if found else None


def _is_published(entry: Entry, path: Path) -> bool:
    try:
        weights = read_weights(path)
    except WeightsError:
        return False
    return entry.family in weights.families and weights.base_model == entry.base_model
