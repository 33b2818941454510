"""What layers saw and gave in the teacher's last passes, so that every pass serves many updates.

A pass of the teacher takes several times as long as an update of all blocks in the layers stage.
Each block learns from its own layer's map and output alone, so both are kept, and updates go over
the kept passes again: the newest one first, as it comes, then any.
"""

import random
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, cast

import torch

from .data import Batch
from .teacher import Teacher, Visit

# Beyond it float16 has no numbers.
_HALF = 65504.0


class Kept(NamedTuple):
    """One pass: its batch, and site → x, y [B, H, W, C] each in 16 bits in main memory."""

    batch: Batch
    # Of the whole batch, which many processes share.
    images: int
    # False where a map is not finite: it is gone over once, for the guard to say so.
    finite: bool
    maps: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def bytes(self) -> int:
        """What the maps of the whole batch take: the same for every process."""
        here = sum(each.nbytes for pair in self.maps.values() for each in pair)
        return here // len(self.batch) * self.images


def record(
    teacher: Teacher, batch: Batch, images: int, parts: int, sites: Collection[str], most: float
) -> Kept | None:
    """What the layers of `sites` see and give for `batch`, this process's share of `images`.

    None where it is beyond `most` bytes for all images.
    """
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {site: [] for site in sites}
    most *= len(batch) / images
    taken, finite = 0, True

    def visit(site, x, attend):
        nonlocal taken, finite
        y = attend()
        if site in found and taken <= most:
            pair = _stored(x), _stored(y)
            taken += sum(each.nbytes for each in pair)
            finite = finite and all(each.isfinite().all() for each in pair)
            found[site].append(pair)
        return y

    for part in batch.parts(parts):
        with torch.no_grad():
            teacher.predict(part.x, part.sigma, part.conditions, visit)
        if taken > most:
            return None
    return Kept(batch, images, finite, {site: _joined(pairs) for site, pairs in found.items()})


def _stored(x: torch.Tensor) -> torch.Tensor:
    small = x.detach()
    if small.dtype not in (torch.float16, torch.bfloat16):
        half = small.abs().amax() < _HALF
        small = small.to(torch.float16 if half else torch.bfloat16)
    return small.to("cpu", copy=True)


def _joined(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*pairs, strict=True)
    return torch.cat(x), torch.cat(y)


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
