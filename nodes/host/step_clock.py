"""Seconds of a sampler's steps, taken where the sampler reports its progress."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ...kernels.timing import synchronize

# Where these stand among the arguments of a guider's outer_sample.
_SIGMAS, _CALLBACK = 3, 5


class Counted(NamedTuple):
    """What a sampling's layers have come to so far: calls, and what they saved in seconds."""

    calls: int = 0
    saved: float = 0.0


@dataclass
class Series:
    """Steps of one kind: how many, their seconds, and what was counted within them."""

    steps: int = 0
    seconds: float = 0.0
    counted: Counted = field(default_factory=Counted)

    @property
    def step(self) -> float | None:
        """Mean seconds of a step; None without steps."""
        return self.seconds / self.steps if self.steps else None


@dataclass
class StepClock:
    """The steps of one sampling by kind, which `kind(sigma)` says at the sigma where each begins.

    The first `skipped` of successive steps of a kind are left out: they load weights and kernels,
    compile, or time layers. `counted` is read where the others begin and end.
    """

    kind: Callable[[float], str]
    counted: Callable[[], Counted] = Counted
    skipped: int = 1
    series: defaultdict[str, Series] = field(default_factory=lambda: defaultdict(Series))

    def run(self, executor, args: tuple, kwargs: dict):
        """Call what an OUTER_SAMPLE wrapper is given, and hear of its steps."""
        if len(args) <= _SIGMAS:
            # A guider of another node, which names its arguments.
            return executor(*args, **kwargs)
        arguments = list(args)
        given = arguments[_CALLBACK] if len(args) > _CALLBACK else kwargs.get("callback")
        heard = self._hearing(args[_SIGMAS], executor.class_obj.model_patcher.load_device, given)
        if len(args) > _CALLBACK:
            arguments[_CALLBACK] = heard
        else:
            kwargs = {**kwargs, "callback": heard}
        return executor(*arguments, **kwargs)

    def _hearing(self, sigmas: torch.Tensor, device: torch.device, given: Callable | None):
        """The sampler's callback, which passes on to `given`: progress and previews."""
        kinds = [self.kind(sigma) for sigma in sigmas.tolist()[:-1]]
        # Step, time and counts where the present steps of one kind begin to be measured.
        first, begun = 0, None

        def heard(step, *progress):
            nonlocal first, begun
            kind = kinds[step] if 0 <= step < len(kinds) else None
            if kind and (step == 0 or kinds[step - 1] != kind):
                first, begun = step, None
            if kind and step - first == self.skipped - 1:
                begun = (step, _now(device), self.counted())
            elif kind and begun and (step + 1 == len(kinds) or kinds[step + 1] != kind):
                self._add(kind, step, begun, device)
            if given is not None:
                given(step, *progress)

        return heard

    def _add(self, kind: str, step: int, begun: tuple[int, float, Counted], device) -> None:
        first, since, before = begun
        series, after = self.series[kind], self.counted()
        series.steps += step - first
        series.seconds += _now(device) - since
        series.counted = Counted(
            series.counted.calls + after.calls - before.calls,
            series.counted.saved + after.saved - before.saved,
        )


def readable(seconds: float, digits: int = 3) -> str:
    """Seconds in so many digits or as a whole number, never with a power of ten."""
    return f"{seconds:.0f}" if seconds >= 10 ** (digits - 1) else f"{seconds:.{digits}g}"


def _now(device: torch.device) -> float:
    # Only where a series begins and ends: in between, the host may run ahead of the device.
    synchronize(device)
    return time.perf_counter()
