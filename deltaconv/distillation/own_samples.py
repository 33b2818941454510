"""Training data from prompts alone: the teacher's own samples and their trajectories."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..weights.file import write_atomically
from ..weights.header import read_header
from ..whole_file import held, remove_unfinished
from .data import Dataset, Trajectory
from .settings import DistillationError
from .teacher import Condition, Point, Teacher, sample

# Most bytes of a file's header: names, shapes and offsets of four tensors.
_HEADER = 512
# A trajectory's tensors in a file, in the order of its fields.
_TENSORS = ("x", "sigma", "predicted")


def own_samples(
    teacher: Teacher,
    conditions: Sequence[Condition],
    names: Sequence[str],
    unconditional: Condition,
    shape: tuple[int, int, int],
    *,
    count: int,
    steps: int = 20,
    cfg: float = 4.0,
    seed: int = 0,
    former_seed: int | None = None,
    batch: int = 4,
    cache: Path | None = None,
    max_bytes: int = 2**30,
    unconditional_name: str = "",
    predicted: bool = False,
    enough: Callable[[int], bool] = lambda drawn: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    reused: Callable[[int, int], None] = lambda count, found: None,
) -> Dataset:
    """`count` samples [C, H, W] of the teacher, cycling through `conditions`, as a data set.

    `names` and `unconditional_name` identify the conditions in the cache's key. Each trajectory
    keeps as many points, in float16, as fit into `max_bytes` with the finished samples, which are
    float32 in memory; with `predicted` also what the teacher predicted there. `cache` keeps all of
    it on disk, within the same limit; the oldest samples of other settings make room. Where it
    holds samples of `former_seed` and none of `seed`, those are completed. `enough` is asked with
    the number of samples there are before a batch is drawn, and ends it. `progress` hears (done,
    total) in steps of sampling, and `reused` at the end the numbers of all samples and of those
    from the cache.
    Raises DistillationError where not one point per sample fits.
    """
    if not conditions or len(names) != len(conditions):
        raise DistillationError(f"Expected prompts to draw samples from, got {len(conditions)}.")
    size = 2 * shape[0] * shape[1] * shape[2]
    # A point has a sigma, a file a header.
    room = max_bytes - _HEADER * -(-count // batch)
    point = size * (3 if predicted else 1) + 4
    kept = min(steps, (room // max(1, count) - size) // point)
    if kept < 1:
        needed = count * (size + point) + _HEADER * -(-count // batch)
        raise DistillationError(
            f"Expected room for {count} samples, {needed} bytes, got a limit of {max_bytes}. Allow "
            "more, or draw fewer."
        )
    which = [round(i * (steps - 1) / max(1, kept - 1)) for i in range(kept)]
    named = [*names, unconditional_name]

    def key_of(seed: int) -> str:
        what = (teacher.fingerprint, named, shape, count, steps, cfg, seed, kept, batch)
        return _key(*what, "predicted") if predicted else _key(*what)

    if former_seed is not None and cache and not _held(cache, key_of(seed)):
        seed = former_seed if _held(cache, key_of(former_seed)) else seed
    key = key_of(seed)
    latents, paths, found = [], [], 0
    total = steps * -(-count // batch)
    for number, start in enumerate(range(0, count, batch)):
        before = number * steps
        rows = range(start, min(start + batch, count))
        file = cache / f"samples-{key}-{start:06d}.safetensors" if cache else None
        tensors = _cached(file, _shapes(len(rows), kept, shape, predicted))
        if tensors is None and enough(len(latents)):
            break
        if tensors is None:
            tensors = _draw(
                teacher,
                conditions,
                unconditional,
                shape,
                rows,
                steps,
                cfg,
                seed,
                which,
                predicted,
                lambda step, before=before: progress(before + step, total),
            )
            if cache is not None and file is not None:
                with held(cache):
                    _make_room(cache, key, max_bytes - sum(t.nbytes for t in tensors.values()))
                    write_atomically(tensors, {}, file, overwrite=True)
        else:
            found += len(rows)
            progress(before + steps, total)
        latents += list(tensors["latents"].float())
        paths += [
            Trajectory(*parts)
            for parts in zip(*(tensors[name] for name in _TENSORS if name in tensors), strict=True)
        ]
    reused(len(latents), found)
    chosen = [conditions[index % len(conditions)] for index in range(len(latents))]
    return Dataset(latents, chosen, unconditional, paths)


def _draw(
    teacher, conditions, unconditional, shape, rows, steps, cfg, seed, which, predicted, progress
):
    # One generator per image: a sample does not depend on the batch it is drawn in.
    noise = torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed((seed + row) % 2**63))
            for row in rows
        ]
    )
    points: list[Point] = []
    chosen = [conditions[row % len(conditions)] for row in rows]
    result = sample(
        teacher,
        chosen,
        unconditional,
        noise,
        steps=steps,
        cfg=cfg,
        points=points,
        progress=progress,
    )
    chosen_points = [points[at] for at in which]
    tensors = {
        "latents": result.half(),
        "x": torch.stack([point.x for point in chosen_points], dim=1).half(),
        "sigma": torch.stack([point.sigma for point in chosen_points], dim=1).float(),
    }
    if predicted:
        both = [torch.stack(point.predicted, dim=1) for point in chosen_points]
        tensors["predicted"] = torch.stack(both, dim=1).half()
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _shapes(rows: int, kept: int, shape: tuple[int, int, int], predicted: bool) -> dict:
    shapes = {"latents": (rows, *shape), "x": (rows, kept, *shape), "sigma": (rows, kept)}
    return shapes | ({"predicted": (rows, kept, 2, *shape)} if predicted else {})


def _cached(file: Path | None, shapes: dict):
    """The file's tensors; None where it is missing, damaged or of other shapes."""
    if file is None or not file.is_file():
        return None
    try:
        read_header(file)
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError):
        return None
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        return None
    return tensors if all(tensor.isfinite().all() for tensor in tensors.values()) else None


def _held(cache: Path, key: str) -> bool:
    return next(cache.glob(f"samples-{key}-*.safetensors"), None) is not None


def _key(*what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def _make_room(cache: Path, key: str, max_bytes: int) -> None:
    """Remove other settings' samples, oldest first, until the rest fits into `max_bytes`."""
    remove_unfinished(cache, "samples-")
    files = sorted(cache.glob("samples-*.safetensors"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in files) + _HEADER
    for path in files:
        if total <= max_bytes:
            return
        if not path.name.startswith(f"samples-{key}-"):
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
