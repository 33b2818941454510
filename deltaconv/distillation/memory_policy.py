"""In how many parts a batch is computed: more of them where memory runs out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from ..memory import is_out_of_memory
from .settings import StageSettings

_T = TypeVar("_T")


class MemoryPolicy:
    """Doubles the parts of a batch at the first out-of-memory; a second one is raised.

    `note` hears of the doubling. `factor` is 1, 2 after an
    out-of-memory, and what the state says where a run is resumed.
    """

    def __init__(self, device: torch.device, note: Callable[[str], None]):
        self.device, self.note = device, note
        self.factor = 1

    def parts(self, stage: StageSettings) -> int:
        """The number of parts that a batch of this stage is computed in."""
        return min(stage.accumulate * self.factor, stage.batch)

    def run(self, stage: StageSettings, compute: Callable[[], _T]) -> _T:
        """What `compute` returns, called again with twice the parts where memory ran out."""
        try:
            return compute()
        except RuntimeError as error:
            exhausted = self.factor > 1 or self.parts(stage) >= stage.batch
            if exhausted or not is_out_of_memory(error):
                raise
            self.factor = 2
            images = -(-stage.batch // self.parts(stage))
            self.note(f"out of memory: {images} images at a time from here on")
        # Outside the handler, which keeps the failed step's tensors alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return compute()
