"""The ΔConv file format: read our own and the published safetensors, write our own.

Our own files name every tensor `<site path>.<published tensor name>`, with ComfyUI's site paths,
and have string metadata:

    deltaconv.format      "1"
    deltaconv.family      a name in `families.FAMILIES`, or any other name, or ""
    deltaconv.gate        "scaled" | "sigmoid"
    deltaconv.sites       JSON: site path → {"kernel": k, "scales": [...]}
    deltaconv.base_model  the model that the blocks were distilled from, in words
    deltaconv.training    JSON: how they were trained
    deltaconv.start       share of sampling from which on they act; absent: 0

A block with pooled tokens, which no published file has, adds `tokens.scale.weight`
[heads], `tokens.qkv.weight` [3C, C] and `tokens.out.weight` [C, C]; see `tokens.PooledAttention`.

Published files name them `<diffusers path>.conv1.<published tensor name>`, with prefixes in front,
other weights beside them, and no metadata.
"""

import json
import os
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import save

from ...kernels import GATES
from ..families import FAMILIES, families_of
from ..geometry import BlockGeometry, default_scales, read_geometry
from ..start import EXPECTED, read_start, start_text
from ..whole_file import write_whole
from .header import Header, named, open_tensors, quoted, read_header, shortened
from .keys import Blocks, network_order, own_keys, published_keys, refuse_published
from .model import DeltaConvWeights, WeightsError, require_finite

FORMAT = "1"
_DTYPES = {"F16", "BF16", "F32", "F64"}
# In characters of the JSON of sites or training; SDXL's 70 sites take 8 000.
LONGEST_RECORD = 1 << 20
_LONGEST_NAME = 300
# Three times what a block of eight scales has.
_MOST_TENSORS_OF_A_BLOCK = 64


class _Description(TypedDict):
    """What a file says of its blocks beside their tensors: fields of DeltaConvWeights."""

    gate: str
    scales: dict[str, tuple[float, ...]]
    family: str
    base_model: str
    training: dict[str, object]
    start: float


@dataclass(frozen=True)
class _FileTensors(Mapping):
    """Tensor name → tensor of one site, each read from the file on access.

    Raises WeightsError where the file is not the one whose header was read.
    """

    path: Path
    keys_by_name: Mapping[str, str]
    # What `_identity` said of the file when its header was read.
    identity: tuple[int, ...]

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._opened() as file:
            return file.get_tensor(self.keys_by_name[name])

    def items(self) -> ItemsView[str, torch.Tensor]:
        """All tensors of the site, with the file opened once."""
        with self._opened() as file:
            return {name: file.get_tensor(key) for name, key in self.keys_by_name.items()}.items()

    def _opened(self):
        file = open_tensors(self.path)
        if _identity(self.path) != self.identity:
            raise WeightsError(
                f"Expected {self.path.name} as it was when it was loaded, got another file in its "
                "place. Queue again to load that one."
            )
        return file

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_by_name)

    def __len__(self) -> int:
        return len(self.keys_by_name)


def read_weights(path: str | os.PathLike, *, finite: bool = False) -> DeltaConvWeights:
    """Weights of a safetensors file, our own or published; tensors are read on access.

    With `finite` every tensor of a block is read once, one at a time, to refuse NaN and infinite
    values here rather than on access. Raises WeightsError for other file formats, damaged files,
    no blocks or malformed ones, and metadata that contradict the tensors.
    """
    path = Path(path)
    identity = _identity(path)
    header = read_header(path)
    by_site, note = published_keys(header.shapes, path.name)
    published = bool(by_site)
    if not published:
        by_site = own_keys(header.shapes)
        if "deltaconv.format" not in header.metadata:
            refuse_published(by_site, path.name)
    if not by_site:
        raise WeightsError(
            f"Expected ΔConv blocks in {path.name}, got {len(header.shapes)} tensors and none of a "
            f"block{_example(header.shapes)}. Is this a checkpoint or a LoRA? ΔConv files have "
            "names such as ….conv1.conv_up.weight."
        )
    sites = _geometries(by_site, header, path.name)
    description = _describe(header.metadata, sites, path.name)
    if published and not description["base_model"]:
        description["base_model"] = _published_base(sites, path.name)
    source = f"{path.name} ({note})" if note else path.name
    if finite:
        with open_tensors(path) as file:
            for site in sites:
                tensors = ((name, file.get_tensor(key)) for name, key in by_site[site].items())
                require_finite(site, tensors, source)
    tensors = {site: _FileTensors(path, keys, identity) for site, keys in by_site.items()}
    return DeltaConvWeights(sites=sites, tensors=tensors, source=source, **description)


def _identity(path: Path) -> tuple[int, ...]:
    """What changes where a file is written again or replaced; () where it cannot be asked."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def write_weights(
    weights: DeltaConvWeights, path: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Write `weights` in our own format, all or nothing; returns the path.

    Raises FileExistsError if the file exists and `overwrite` is False, WeightsError for a wrong
    name or values that are not finite, WriteError where the disk is full or the folder may not be
    written to; no file is changed or left behind then.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"Expected a file name that ends in .safetensors, got {path.name!r}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or allow overwriting.")
    tensors = {
        f"{site}.{name}": tensor.detach().cpu().contiguous()
        for site in weights.sites
        for name, tensor in weights.state(site).items()
    }
    sites = {
        site: {"kernel": geometry.kernel_size, "scales": list(weights.scales[site])}
        for site, geometry in weights.sites.items()
    }
    metadata = {
        "deltaconv.format": FORMAT,
        "deltaconv.family": weights.families[0] if len(weights.families) == 1 else "",
        "deltaconv.gate": weights.gate,
        "deltaconv.sites": json.dumps(sites),
        "deltaconv.base_model": weights.base_model,
        "deltaconv.training": json.dumps(dict(weights.training)),
    }
    if weights.start:
        metadata["deltaconv.start"] = start_text(weights.start)
    if long := [key for key, text in metadata.items() if len(text) > LONGEST_RECORD]:
        raise WeightsError(
            f"Expected at most {LONGEST_RECORD} characters of metadata, got more in "
            f"{', '.join(long)}, which could not be read again. Keep less of it."
        )
    write_atomically(tensors, metadata, path, overwrite)
    return path


def _geometries(by_site: Blocks, header: Header, name: str) -> dict[str, BlockGeometry]:
    """Site path → geometry, in a stable order; raises WeightsError naming the first bad block."""
    sites = {}
    for site in sorted(by_site, key=network_order):
        keys = by_site[site]
        if len(keys) > _MOST_TENSORS_OF_A_BLOCK:
            raise WeightsError(
                f"{shortened(site)} of {name}: expected the tensors of a ΔConvBlock, got "
                f"{len(keys)} ({named(keys)}). Get the file again."
            )
        if alien := sorted({header.dtypes[key] for key in keys.values()} - _DTYPES):
            raise WeightsError(
                f"Expected ΔConv weights in {', '.join(sorted(_DTYPES))}, got {', '.join(alien)} "
                f"in {shortened(site)} of {name}. Save them in one of these."
            )
        try:
            sites[site] = read_geometry({part: header.shapes[key] for part, key in keys.items()})
        except ValueError as error:
            raise WeightsError(
                f"{shortened(site)} of {name}: {shortened(str(error), 1000)}"
            ) from error
    return sites


def _published_base(sites: Mapping[str, BlockGeometry], name: str) -> str:
    """The model that published blocks of this family were made for; WeightsError if unknown."""
    fits = families_of({site: geometry.dim for site, geometry in sites.items()})
    if not fits:
        site, geometry = next(iter(sites.items()))
        raise WeightsError(
            f"Expected blocks of {', '.join(f.title for f in FAMILIES.values())} in {name}, got "
            f"{len(sites)} that fit none of them (the first: {shortened(site)} with {geometry.dim} "
            "channels)."
        )
    return next((family.published_base for family in fits if family.published_base), "")


def _describe(
    metadata: Mapping[str, str], sites: Mapping[str, BlockGeometry], name: str
) -> _Description:
    """Gate, scales, family and record from the metadata; defaults are the family's."""

    def refuse(expected: str, got: object) -> WeightsError:
        return WeightsError(
            f"Expected {expected} in the metadata of {name}, got {quoted(got)}. It was written by "
            "a newer version or changed by hand: get the file again, or update this pack."
        )

    version = metadata.get("deltaconv.format", FORMAT)
    if version != FORMAT:
        raise refuse(f"format version {FORMAT}", version)
    fits = families_of({site: geometry.dim for site, geometry in sites.items()})
    family = metadata.get("deltaconv.family", "")
    if len(family) > _LONGEST_NAME:
        raise refuse(f"a family of at most {_LONGEST_NAME} characters", family)
    known = FAMILIES.get(family) or (fits[0] if fits else None)
    gate = metadata.get("deltaconv.gate") or (known.gate if known else "scaled")
    if gate not in GATES:
        raise refuse(f"a gate out of {GATES}", gate)
    records = _json_object(metadata, "deltaconv.sites", refuse)
    scales = {}
    for site, geometry in sites.items():
        record = records.get(site, {})
        if not isinstance(record, dict):
            raise refuse(f"kernel and scales of {shortened(site)}", record)
        if (kernel := record.get("kernel", geometry.kernel_size)) != geometry.kernel_size:
            expected = f"kernel {geometry.kernel_size} for {shortened(site)}, as its tensors have"
            raise refuse(expected, kernel)
        values = record.get("scales") or default_scales(geometry.num_scales)
        if not _are_scales(values, geometry.num_scales):
            expected = f"{geometry.num_scales} scales in (0, 1] for {shortened(site)}"
            raise refuse(expected, values)
        scales[site] = tuple(float(value) for value in values)
    start = read_start(metadata.get("deltaconv.start", "0"))
    if start is None:
        raise refuse(EXPECTED, metadata["deltaconv.start"])
    return {
        "gate": gate,
        "scales": scales,
        "family": family,
        "base_model": shortened(metadata.get("deltaconv.base_model", ""), _LONGEST_NAME),
        "training": _json_object(metadata, "deltaconv.training", refuse),
        "start": start,
    }


def _are_scales(values: object, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(type(v) in (int, float) and 0 < v <= 1 for v in values)
    )


def _json_object(metadata: Mapping[str, str], key: str, refuse) -> dict:
    text = metadata.get(key, "{}")
    if len(text) > LONGEST_RECORD:
        raise refuse(f"at most {LONGEST_RECORD} characters under {key}", text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise refuse(f"JSON under {key}", text) from None
    if not isinstance(value, dict):
        raise refuse(f"a JSON object under {key}", text)
    return value


def _example(shapes: Mapping[str, tuple]) -> str:
    return f" (the first is {named(list(shapes)[:1])})" if shapes else ""


def write_atomically(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path, overwrite: bool
) -> None:
    """Write a safetensors file whole or not at all; see `write_whole`."""
    # Not by safetensors' save_file, whose file is readable by its owner alone.
    write_whole(path, save(dict(tensors), metadata=dict(metadata)), overwrite=overwrite)
