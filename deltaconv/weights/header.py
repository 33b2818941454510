"""Read a safetensors header within bounds that are checked on its bytes, before it is parsed.

Files are untrusted, and a parser allocates whatever a small header asks for. The bounds are far
above real files: a full SDXL checkpoint with blocks beside it has about 3 000 tensors, keys below
200 characters, and a header of half a megabyte.
"""

import os
import reprlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .model import WeightsError

LARGEST_HEADER = 8 << 20
MOST_TENSORS = 20_000
MOST_METADATA = 10_000
LONGEST_KEY = 500
# Commas and opening brackets outside of strings, per tensor: rank, offsets, fields.
_VALUES_PER_TENSOR = 16

_KINDS = {
    b"GGUF": "a GGUF file",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"RIFF": "a WebP, WAV or AVI file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}
_LONGEST_START = max(map(len, _KINDS))

_repr = reprlib.Repr()
_repr.maxstring = 80


@dataclass(frozen=True)
class Header:
    """Shapes and dtypes of a file's tensors by key, and its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file, within bounds; raises WeightsError for anything else."""
    objects = _check_bytes(path)
    with open_tensors(path) as file:
        keys, metadata = file.keys(), file.metadata()
        # The parser keeps one of several entries with the same key; other readers keep another.
        if (different := len(keys) + 1 + (metadata is not None)) < objects:
            raise _not_ours(path, f"{objects - different} keys of it stand there twice")
        if (longest := max(map(len, keys), default=0)) > LONGEST_KEY:
            raise _not_ours(path, f"a key of {longest} characters, at most {LONGEST_KEY} are read")
        slices = {key: file.get_slice(key) for key in keys}
        return Header(
            shapes={key: tuple(entry.get_shape()) for key, entry in slices.items()},
            dtypes={key: entry.get_dtype() for key, entry in slices.items()},
            metadata=metadata or {},
        )


def open_tensors(path: Path) -> safe_open:
    """The opened file; errors of safetensors and of the system become WeightsError."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise _not_ours(path, shortened(str(error), 200)) from error
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def shortened(text: str, limit: int = 80) -> str:
    """`text` without its middle if it is longer than `limit`."""
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]}…{text[-(limit // 3) :]} ({len(text)} characters)"


def named(names: Iterable[str], limit: int = 3) -> str:
    """The first `limit` names, each shortened and quoted, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(shortened(name)) for name in names[:limit]) + more


def quoted(value: object) -> str:
    """A short repr of any JSON value, made without building the full one."""
    return shortened(_repr.repr(value), 200)


def _check_bytes(path: Path) -> int:
    """The number of JSON objects in the header of the file `path`.

    Raises WeightsError unless it is a file that begins with a header within bounds.
    """
    try:
        # Opening a pipe or a device may block, or never end.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise _unreadable(path, f"it is a {'folder' if stat.S_ISDIR(mode) else 'device'}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(max(16, _LONGEST_START))
            length = int.from_bytes(start[:8], "little")
            _check_start(path, start, length, size)
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    return _check_counts(path, header)


def _check_start(path: Path, start: bytes, length: int, size: int) -> None:
    # The length that a safetensors file begins with can have any bytes; its header follows.
    is_header = start[8:9] == b"{"
    # Recognized by its first bytes and never opened: unpickling runs code of the file.
    if not is_header and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise WeightsError(
            f"Expected a safetensors file, got a pickle (.pt, .ckpt) in {path.name}. Pickles can "
            "run code and are never opened; convert it to safetensors first."
        )
    if not is_header:
        known = next((kind for begins, kind in _KINDS.items() if start.startswith(begins)), "")
        raise _not_ours(path, known or "no header follows its first 8 bytes")
    if length > size - 8:
        raise _not_ours(path, f"a header of {length} bytes is announced, {size - 8} follow")
    if length > LARGEST_HEADER:
        raise _not_ours(path, f"a header of {length} bytes, at most {LARGEST_HEADER} are read")


def _check_counts(path: Path, header: bytes) -> int:
    """The number of objects in the JSON text; WeightsError for more of anything than the bounds."""
    # Without escapes, every quote begins or ends a string.
    bare = header.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in header else header
    # Per tensor: its key, three names of fields, the dtype. Per entry of metadata: key and value.
    most_quotes = 2 * (5 * MOST_TENSORS + 2 * MOST_METADATA)
    outside = b""
    if (quotes := bare.count(b'"')) <= most_quotes:
        outside = b"".join(bare.split(b'"')[::2])
    tensors = outside.count(b"{")
    values = outside.count(b",") + outside.count(b"[")
    if (
        quotes > most_quotes
        or tensors > MOST_TENSORS + 2
        or values > MOST_TENSORS * _VALUES_PER_TENSOR
    ):
        raise _not_ours(
            path,
            f"more than the {MOST_TENSORS} tensors and {MOST_METADATA} entries of metadata that "
            "are read",
        )
    return tensors


def _not_ours(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"Expected a safetensors file, got {path.name} whose header cannot be trusted ({reason}). "
        "It is another format, or was cut short: get it again."
    )


def _unreadable(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"Cannot read {path}: {reason}.")
