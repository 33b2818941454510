"""Choose block or attention per layer and shape by timing both once on the device."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from ...kernels.timing import synchronize
from ..memory import is_out_of_memory

# Seconds of timing per device and process; a measurement that exceeds them is finished.
BUDGET = 2.0
# Calls shorter than this are repeated.
_SHORT = 0.05
_REPEATS = 5
# Loading kernels makes no first call of attention this slow. Where it also takes this many times as
# long as the block, a second call cannot change the choice.
_LONG = 0.2
_CLEAR = 2


Size = tuple[int, int]


@dataclass(frozen=True)
class Choice:
    """Seconds per call of block and attention for one layer and shape; inf: out of memory."""

    block: float
    attention: float
    # Otherwise bounds from the times of another size: `block` from above, `attention` from below.
    measured: bool = True

    @property
    def takes_block(self) -> bool:
        return self.block <= self.attention


@dataclass
class Choices:
    """Choices made so far, and the seconds spent on them; one instance per process."""

    made: dict[tuple[Hashable, Size], Choice] = field(default_factory=dict)
    spent: defaultdict[torch.device, float] = field(default_factory=lambda: defaultdict(float))

    def choose(
        self,
        layer: Hashable,
        size: Size,
        device: torch.device,
        block: Callable[[], object],
        attention: Callable[[], object],
    ) -> Choice:
        """The choice for maps of this size; `layer` identifies everything else the cost depends on.

        Unless the choice is known, both are timed, or judged by the layer's other sizes once the
        device's `BUDGET` is spent.
        """
        key = (layer, size)
        if key not in self.made:
            if self.spent[device] >= BUDGET:
                self.made[key] = self._judged(layer, math.prod(size))
            else:
                self.made[key], took = measure(
                    device, block, attention, BUDGET - self.spent[device]
                )
                self.spent[device] += took
        return self.made[key]

    def _judged(self, layer: Hashable, tokens: int) -> Choice:
        """The block if a timed size of the same layer proves it faster, else attention.

        On a smaller map the block takes no longer, and attention at least its time there times the
        square of the ratio of tokens; on a larger one attention grows faster than the block.
        """
        bounds = [
            Choice(
                known.block,
                known.attention * min(1, tokens / math.prod(size)) ** 2,
                measured=False,
            )
            for (other, size), known in self.made.items()
            if other == layer and known.measured and math.isfinite(known.attention)
        ]
        stays = Choice(math.inf, 0.0, measured=False)
        return max(bounds, key=lambda choice: choice.attention - choice.block, default=stays)


@dataclass
class Savings:
    """What each layer saves at its size in seconds a call; one instance per process.

    For telling only, so that it costs less than a choice: the block's own call is timed, and one or
    two of attention.
    """

    known: dict[Hashable, float] = field(default_factory=dict)
    met: set[Hashable] = field(default_factory=set)
    spent: defaultdict[torch.device, float] = field(default_factory=lambda: defaultdict(float))

    def run(
        self,
        key: Hashable,
        device: torch.device,
        block: Callable[[], torch.Tensor],
        attention: Callable[[], object],
    ) -> tuple[torch.Tensor, float]:
        """The block's output, and what it saves: 0 at the first call of `key`, NaN if unknown.

        The first call loads kernels and tells nothing. The second is timed, unless the device's
        `BUDGET` is spent; attention that runs out of memory spends it all.
        """
        if key in self.known:
            return block(), self.known[key]
        if key not in self.met:
            self.met.add(key)
            return block(), 0.0
        if self.spent[device] >= BUDGET:
            return block(), math.nan
        outputs: list[torch.Tensor] = []

        def kept() -> None:
            outputs.append(block())

        took = seconds(device, kept)
        tries = [_seconds(device, attention)]
        if tries[0] < _SHORT:
            # It may have loaded its kernels.
            tries.append(_seconds(device, attention))
        self.spent[device] += sum(tries)
        self.known[key] = min(tries) - took if min(tries) < math.inf else math.nan
        return outputs[0], self.known[key]


def measure(
    device: torch.device,
    block: Callable[[], object],
    attention: Callable[[], object],
    budget: float = BUDGET,
) -> tuple[Choice, float]:
    """The choice by interleaved medians, and the seconds spent on it without compilation.

    Attention is called only once where that decides, or where a second call would exceed `budget`.
    What runs out of memory loses; if both do, the error is raised.
    """
    start = time.perf_counter()
    first = warm = _seconds(device, block)
    if first < math.inf:
        # Compiling in the first call is not counted: sampling needs it anyway.
        warm = _seconds(device, block)
        start += max(0.0, first - warm)

    def spent() -> float:
        return time.perf_counter() - start

    if warm == math.inf:
        return Choice(math.inf, seconds(device, attention)), spent()
    taken = _seconds(device, attention)
    if taken > max(_LONG, _CLEAR * warm) or spent() + taken > budget:
        return Choice(warm, taken), spent()
    # The first call of attention may have loaded its kernels.
    ways, times = (block, attention), ([warm], [_seconds(device, attention)])
    if max(warm, *times[1]) < _SHORT:
        for _ in range(_REPEATS - 1):
            for way, series in zip(ways, times, strict=True):
                series.append(_seconds(device, way))
    blocks, attentions = map(statistics.median, times)
    return Choice(blocks, attentions), spent()


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    """`seconds`, or inf if the call runs out of memory."""
    try:
        return seconds(device, call)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return math.inf
        raise


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Wall time of one call, the device synchronized before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start
