"""What the teacher showed in its last passes, so that every pass serves several updates.

A pass of the teacher takes several times as long as an update of all blocks in the layers stage,
and about as long as one of the joint stage. Blocks learn from what it showed alone: each from its
own layer's map and output, all together from hidden states and the prediction. So these are kept,
and updates go over the kept passes again: the newest one first, as it comes, then any.
"""

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from einops import rearrange

from .data import Batch
from .losses import compares_features
from .settings import DistillationSettings
from .teacher import Prediction, Teacher, Visit

# Beyond it float16 has no numbers.
_HALF = 65504.0


class Kept(NamedTuple):
    """One pass: its batch, and for the layers stage site → x, y [B, H, W, C] each.

    Maps are kept in 16 bits in main memory. The joint stage's are those of the batch itself.
    """

    batch: Batch
    # Of the whole batch, which many processes share.
    images: int
    # False where a map is not finite: it is gone over once, for the guard to say so.
    finite: bool
    maps: Mapping[str, tuple[torch.Tensor, ...]]

    @property
    def bytes(self) -> int:
        """What the maps of the whole batch take: the same for every process."""
        here = sum(each.nbytes for pair in self.maps.values() for each in pair)
        return (here + self.batch.nbytes) // len(self.batch) * self.images


class _Maps:
    """Maps of a pass by site, as many of each as are given together, up to `most` bytes."""

    def __init__(self, most: float):
        self.left, self.finite = most, True
        self.found: dict[str, list[tuple[torch.Tensor, ...]]] = {}

    @property
    def full(self) -> bool:
        """Whether there was more."""
        return self.left < 0

    def add(self, site: str, *maps: torch.Tensor) -> None:
        """Keep a part's maps [B, …]; parts come in order."""
        if not self.full:
            stored = tuple(map(_stored, maps))
            self.left -= sum(each.nbytes for each in stored)
            self.finite = self.finite and all(each.isfinite().all() for each in stored)
            self.found.setdefault(site, []).append(stored)

    def joined(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Site → the whole batch's maps."""
        return {
            site: tuple(map(torch.cat, zip(*parts, strict=True)))
            for site, parts in self.found.items()
        }


@torch.no_grad()
def record(
    teacher: Teacher, batch: Batch, images: int, parts: int, sites: Collection[str], most: float
) -> Kept | None:
    """What the layers of `sites` see and give for `batch`, this process's share of `images`.

    None where it is beyond `most` bytes for all images.
    """
    maps = _Maps(most * len(batch) / images - batch.nbytes)

    def visit(site, x, attend):
        y = attend()
        if site in sites:
            maps.add(site, x, y)
        return y

    for part in batch.parts(parts):
        teacher.predict(part.x, part.sigma, part.conditions, visit)
        if maps.full:
            return None
    return Kept(batch, images, maps.finite, maps.joined())


@torch.no_grad()
def record_joint(
    teacher: Teacher,
    batch: Batch,
    images: int,
    parts: int,
    sites: Collection[str],
    most: float,
    settings: DistillationSettings,
) -> Kept | None:
    """`batch` with what the joint losses of `settings` compare with; otherwise as `record`."""
    by_feature, guided = compares_features(settings), bool(settings.losses.get("guided"))
    if batch.predicted and not by_feature:
        return Kept(batch, images, True, {})
    ways = 2 if guided else 1
    maps, predicted = _Maps(most * len(batch) / images - batch.nbytes), []
    for part in batch.parts(parts):
        each = part.both_ways() if guided else part
        states: dict[str, torch.Tensor] = {}
        eps = teacher.predict(
            each.x, each.sigma, each.conditions, None, states if by_feature else None
        )
        maps.left -= eps.nbytes
        predicted.append(_by_image(eps, ways))
        for site, h in states.items():
            if site in sites:
                maps.add(site, _by_image(h, ways))
        if maps.full:
            return None
    eps = torch.cat(predicted)
    finite = maps.finite and bool(eps.isfinite().all())
    hidden = {site: h for site, (h,) in maps.joined().items()}
    known = replace(batch, predicted=Prediction(eps[:, 0], eps[:, -1]), hidden=hidden)
    return Kept(known, images, finite, {})


def _by_image(x: torch.Tensor, ways: int) -> torch.Tensor:
    """[ways · B, …] → [B, ways, …]."""
    return rearrange(x, "(ways b) ... -> b ways ...", ways=ways)


def _stored(x: torch.Tensor) -> torch.Tensor:
    small = x.detach()
    if small.dtype not in (torch.float16, torch.bfloat16):
        half = small.abs().amax() < _HALF
        small = small.to(torch.float16 if half else torch.bfloat16)
    return small.to("cpu", copy=True)


class KeptTeacher:
    """Shows a pass as the teacher did, part by part in the same order, without running it."""

    def __init__(self, kept: Kept, device: torch.device):
        self.kept, self.device = kept, device
        self.shown = 0

    def predict(self, x, sigma, conditions, visit: Visit) -> None:
        """Show `visit` the maps of the next len(x) images."""
        rows = slice(self.shown, self.shown + len(x))
        self.shown += len(x)
        for site, (seen, given) in self.kept.maps.items():
            given = given[rows].to(self.device)
            visit(site, seen[rows].to(self.device), lambda look=None, y=given: y)

    def as_teacher(self) -> Teacher:
        """Itself, for the layers stage, which asks a teacher for nothing else."""
        return cast(Teacher, self)


class KeptPasses:
    """The passes 0, 1, 2 … of a run, of which the last stay as long as they fit into `most` bytes.

    `run(number)` gives a pass, None where it does not fit alone. Which passes are kept depends on
    the newest one alone, so that a run that is resumed goes on with the same.
    """

    def __init__(self, run: Callable[[int], Kept | None], most: float):
        self.run, self.most = run, most
        self.kept: dict[int, Kept] = {}
        # Bytes by number, of passes that went as well.
        self.sizes: dict[int, int] = {}

    def up_to(self, newest: int) -> list[Kept]:
        """The newest pass and those before it that fit beside it; empty where it does not fit."""
        if newest != next(iter(self.kept), None):
            self._make_room(self.sizes.get(newest - 1, 0))
            self.kept = dict(self._back_from(newest))
        return list(self.kept.values())

    def _make_room(self, expected: int) -> None:
        """Let the oldest go before the next one, as large as that before it, is run."""
        while self.kept and sum(kept.bytes for kept in self.kept.values()) + expected > self.most:
            # The last, since the newest stands first.
            self.kept.popitem()

    def _back_from(self, newest: int) -> Iterator[tuple[int, Kept]]:
        left = self.most
        for number in range(newest, -1, -1):
            if self.sizes.get(number, 0) > left:
                return
            kept = self.kept.get(number) or self.run(number)
            if kept is None:
                return
            self.sizes[number] = kept.bytes
            if kept.bytes > left:
                return
            left -= kept.bytes
            yield number, kept


def chosen(passes: list[Kept], step: int, updates: int, seed: int) -> Kept:
    """The pass for update `step`: of these, newest first, the first where it is new, else any."""
    if step % updates == 0:
        return passes[0]
    finite = [kept for kept in passes if kept.finite]
    return random.Random(f"{seed} {step}").choice(finite or passes)
