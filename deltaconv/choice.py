"""Block or attention: whichever is faster for a layer and shape on this device, measured once."""

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

# Calls shorter than this are repeated; a longer one is its own proof.
_SHORT = 0.05
_REPEATS = 5


@dataclass(frozen=True)
class Choice:
    """Seconds per call of both ways of one layer at one shape."""

    block: float
    attention: float

    @property
    def takes_block(self) -> bool:
        return self.block <= self.attention


@dataclass
class Choices:
    """Choices measured so far; one instance serves the whole process."""

    measured: dict[Hashable, Choice] = field(default_factory=dict)

    def choose(
        self,
        key: Hashable,
        device: torch.device,
        block: Callable[[], object],
        attention: Callable[[], object],
    ) -> Choice:
        """The choice for `key`; both are called a few times where it was not measured before."""
        if key not in self.measured:
            self.measured[key] = measure(device, block, attention)
        return self.measured[key]


def measure(
    device: torch.device, block: Callable[[], object], attention: Callable[[], object]
) -> Choice:
    """Interleaved medians after one warm-up call of each."""
    ways = (block, attention)
    times = [[seconds(device, way)] for way in ways]
    # The warm-up may compile; it counts only where a call is so long that this hardly matters.
    if min(first for (first,) in times) > 10 * _SHORT:
        return Choice(*(first for (first,) in times))
    times = [[seconds(device, way)] for way in ways]
    if max(first for (first,) in times) < _SHORT:
        for _ in range(_REPEATS - 1):
            for way, taken in zip(ways, times, strict=True):
                taken.append(seconds(device, way))
    return Choice(*map(statistics.median, times))


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Wall time of one call, the device's queue drained on both sides."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
