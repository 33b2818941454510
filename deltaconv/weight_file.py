"""The ΔConv file format: reading our own and the published safetensors, writing our own.

Our own files name every tensor `<site path>.<published tensor name>`, site paths in ComfyUI's
naming, and say in string metadata what the tensors cannot:

    deltaconv.format      "1"
    deltaconv.family      a name in `families.FAMILIES`, or any other name, or ""
    deltaconv.gate        "scaled" | "sigmoid"
    deltaconv.sites       JSON: site path → {"kernel": k, "scales": [...]}
    deltaconv.base_model  the model that the blocks were distilled from, in words
    deltaconv.training    JSON: how they were trained

Published files name them `<diffusers path>.conv1.<published tensor name>`, with prefixes in front
and other weights beside them, and say nothing more.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..kernels import GATES
from .families import FAMILIES, families_of
from .layout import BlockGeometry, default_scales, read_geometry
from .weight_keys import network_order, own_keys, published_keys
from .weights import DeltaConvWeights, WeightsError

FORMAT = "1"
_DTYPES = {"F16", "BF16", "F32", "F64"}


@dataclass(frozen=True)
class _FileTensors(Mapping):
    """Tensor name → tensor of one site, each read from the file on access."""

    path: Path
    keys_by_name: Mapping[str, str]

    def __getitem__(self, name: str) -> torch.Tensor:
        with _open(self.path) as file:
            return file.get_tensor(self.keys_by_name[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_by_name)

    def __len__(self) -> int:
        return len(self.keys_by_name)


def read_weights(path: str | os.PathLike) -> DeltaConvWeights:
    """Weights of a safetensors file, our own or published; reads the header, tensors on access.

    Raises WeightsError where the file is no safetensors file, is damaged, holds no blocks or
    malformed ones, or says something of itself that its tensors contradict.
    """
    path = Path(path)
    with _open(path) as file:
        metadata = file.metadata() or {}
        header = {key: file.get_slice(key) for key in file.keys()}
        shapes = {key: tuple(entry.get_shape()) for key, entry in header.items()}
        dtypes = {key: entry.get_dtype() for key, entry in header.items()}
    published = published_keys(shapes, path.name)
    by_site = published or own_keys(shapes)
    if not by_site:
        raise WeightsError(
            f"Expected ΔConv blocks in {path.name}, got {len(shapes)} tensors and none of a block"
            f"{_example(shapes)}. Is this a checkpoint or a LoRA? ΔConv files have names such as "
            "….conv1.conv_up.weight."
        )
    sites = _geometries(by_site, shapes, dtypes, path)
    tensors = {site: _FileTensors(path, keys) for site, keys in by_site.items()}
    description = _describe(metadata, sites, path.name)
    if published and not description["base_model"]:
        description["base_model"] = _published_base(sites, path.name)
    return DeltaConvWeights(sites=sites, tensors=tensors, source=path.name, **description)


def write_weights(
    weights: DeltaConvWeights, path: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Write `weights` in our own format, all or nothing; returns the path.

    Raises FileExistsError where the file exists and `overwrite` is False, WeightsError where the
    name is wrong or values are not finite. Nothing is changed or left behind then.
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
    write_atomically(tensors, metadata, path, overwrite)
    return path


def _open(path: Path) -> safe_open:
    """The opened file; every way in which it is no safetensors file becomes one WeightsError."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        # Told apart by name, and never opened: unpickling runs whatever the file says. The length
        # that a safetensors file begins with can have the same bytes; its header follows.
        if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
            raise WeightsError(
                f"Expected a safetensors file, got a pickle (.pt, .ckpt) in {path.name}. Pickles "
                "can run code and are never opened; convert it to safetensors first."
            )
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise WeightsError(
            f"Expected a safetensors file, got {path.name} whose header cannot be trusted "
            f"({error}). It is another format, or was cut short: get it again."
        ) from error
    except OSError as error:
        raise WeightsError(f"Cannot read {path}: {error.strerror or error}.") from error


def _geometries(
    by_site: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple],
    dtypes: Mapping[str, str],
    path: Path,
) -> dict[str, BlockGeometry]:
    """Site path → geometry, in a stable order; raises WeightsError naming the first bad block."""
    sites = {}
    for site in sorted(by_site, key=network_order):
        keys = by_site[site]
        if alien := sorted({dtypes[key] for key in keys.values()} - _DTYPES):
            raise WeightsError(
                f"Expected ΔConv weights in {', '.join(sorted(_DTYPES))}, got {', '.join(alien)} "
                f"in {site} of {path.name}. Save them in one of these."
            )
        try:
            sites[site] = read_geometry({name: shapes[key] for name, key in keys.items()})
        except ValueError as error:
            raise WeightsError(f"{site} of {path.name}: {error}") from error
    return sites


def _published_base(sites: Mapping[str, BlockGeometry], name: str) -> str:
    """The model that published blocks of this family were made for; refuses unknown families."""
    fits = families_of({site: geometry.dim for site, geometry in sites.items()})
    if not fits:
        site, geometry = next(iter(sites.items()))
        raise WeightsError(
            f"Expected blocks of {', '.join(f.title for f in FAMILIES.values())} in {name}, got "
            f"{len(sites)} that fit none of them (the first: {site} with {geometry.dim} channels)."
        )
    return next((family.published_base for family in fits if family.published_base), "")


def _describe(
    metadata: Mapping[str, str], sites: Mapping[str, BlockGeometry], name: str
) -> dict[str, object]:
    """Gate, scales, family and record: as the metadata say, else as the family usually has them."""

    def refuse(expected: str, got: object) -> WeightsError:
        return WeightsError(
            f"Expected {expected} in the metadata of {name}, got {got!r}. It was written by a "
            "newer version or changed by hand: get the file again, or update this pack."
        )

    version = metadata.get("deltaconv.format", FORMAT)
    if version != FORMAT:
        raise refuse(f"format version {FORMAT}", version)
    fits = families_of({site: geometry.dim for site, geometry in sites.items()})
    family = metadata.get("deltaconv.family", "")
    known = FAMILIES.get(family) or (fits[0] if fits else None)
    gate = metadata.get("deltaconv.gate") or (known.gate if known else "scaled")
    if gate not in GATES:
        raise refuse(f"a gate out of {GATES}", gate)
    records = _json_object(metadata, "deltaconv.sites", refuse)
    scales = {}
    for site, geometry in sites.items():
        record = records.get(site, {})
        if not isinstance(record, dict):
            raise refuse(f"kernel and scales of {site}", record)
        if (kernel := record.get("kernel", geometry.kernel_size)) != geometry.kernel_size:
            raise refuse(f"kernel {geometry.kernel_size} for {site}, as its tensors have", kernel)
        values = record.get("scales") or default_scales(geometry.num_scales)
        if not _are_scales(values, geometry.num_scales):
            raise refuse(f"{geometry.num_scales} scales in (0, 1] for {site}", values)
        scales[site] = tuple(float(value) for value in values)
    return {
        "gate": gate,
        "scales": scales,
        "family": family,
        "base_model": metadata.get("deltaconv.base_model", ""),
        "training": _json_object(metadata, "deltaconv.training", refuse),
    }


def _are_scales(values: object, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(type(v) in (int, float) and 0 < v <= 1 for v in values)
    )


def _json_object(metadata: Mapping[str, str], key: str, refuse) -> dict:
    text = metadata.get(key, "{}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise refuse(f"JSON under {key}", text[:80]) from None
    if not isinstance(value, dict):
        raise refuse(f"a JSON object under {key}", text[:80])
    return value


def _example(shapes: Mapping[str, tuple]) -> str:
    return f" (the first is {next(iter(shapes))})" if shapes else ""


def write_atomically(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path, overwrite: bool
) -> None:
    """Temporary file in the same folder, fsync, then one rename: a reader sees all or nothing."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.part")
    try:
        # Written here because safetensors' own file is readable by its owner alone.
        with open(temporary, "xb") as file:
            file.write(save(dict(tensors), metadata=dict(metadata)))
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _rename_to_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Rename unless the name was taken meanwhile; a plain rename would overwrite on POSIX."""
    if os.name == "nt":
        os.rename(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # File systems without hard links: the remaining race is a few microseconds long.
        if path.exists():
            raise FileExistsError(f"{path} exists already: choose another name.") from None
        os.rename(temporary, path)
