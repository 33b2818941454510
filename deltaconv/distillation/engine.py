"""What computes a step's gradients: this process alone, or with others (`deltaconv/scale`)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from .checkpoint import Checkpoints
from .data import Batch
from .losses import batch_losses
from .memory_policy import MemoryPolicy
from .settings import StageSettings
from .teacher import Teacher
from .training import Training

_T = TypeVar("_T")


class Engine:
    """One process. A subclass has many of them take the same steps, each on its share of a batch.

    Everything but `losses` is done by every process alike, so that all of them hold the same state.
    """

    # Whether other processes wait for this one's saves and steps.
    alone = True
    # Whether this process prints and writes for all.
    main = True

    def __init__(self) -> None:
        # Set where all processes are to stop after the step that they are in.
        self.stopping = False

    def ask_to_stop(self) -> None:
        """Stop all processes after the same step; may be called in a signal handler."""
        self.stopping = True

    def shared(self, decide: Callable[[], _T]) -> _T:
        """What `decide` returns, which is asked once: what clocks say must not differ."""
        return decide()

    def checkpoints(self, folder: Path | None, identity: Mapping[str, object]) -> Checkpoints:
        """The states of a run in `folder`."""
        return Checkpoints(folder, identity)

    def rows(self, stage: StageSettings) -> list[int] | None:
        """The images of a stage's batch that this process takes; None: all of them."""
        return None

    def within_memory(
        self, memory: MemoryPolicy, stage: StageSettings, compute: Callable[[], _T]
    ) -> _T:
        """What `compute` returns of this process's share of a batch, by `memory`'s policy."""
        return memory.run(stage, compute)

    def losses(
        self, teacher: Teacher, training: Training, batch: Batch, parts: int, joint: bool
    ) -> dict[str, float]:
        """The losses of the whole batch, whose gradients are then set; `batch` holds `rows`."""
        backward = training.optimizer.backward
        return batch_losses(
            teacher, training.student, batch, parts, backward, training.settings, joint
        )
