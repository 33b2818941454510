"""A training in progress: student, optimizer, random state and counters, as states save them."""

from collections.abc import Collection

import torch

from .checkpoint import Progress, State
from .settings import DistillationError, DistillationSettings, StageName
from .student import Optimizer, Student


class Training:
    """Everything that a training step changes; `state` saves it and `take_up` restores it.

    `half_base` tells that the joint stage's gradients pass through a float16 base.
    """

    def __init__(self, student: Student, settings: DistillationSettings, half_base: bool):
        self.student, self.settings, self.half_base = student, settings, half_base
        self.generator = torch.Generator().manual_seed(settings.seed)
        # Of the last whole step; the generator itself may be within a draw.
        self.random_state = self.generator.get_state()
        self.stage: StageName = "layers"
        # Steps of the stage, draws from the data, and steps of all stages.
        self.step = self.position = self.number = 0
        # The sites that were chosen, if that was done.
        self.replaced: tuple[str, ...] | None = None
        # Whether passes of the stage may be kept: until one did not fit.
        self.keeps = True
        # False while weights, optimizer and counters belong to different steps.
        self.whole = True
        # The loss of every training step so far, across resumed runs.
        self.history: list[float] = []
        self.optimizer = self._new_optimizer()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the student's tensors."""
        return {name: tuple(p.shape) for name, p in self.student.parameters.items()}

    def update(self, loss: float) -> str:
        """One step of the optimizer; returns what its guard did, "" where nothing."""
        self.whole = False
        try:
            note = self.optimizer.update(self.step, loss)
        except DistillationError:
            # The guard raises before mutating state; reset its counter so the caller can continue.
            self.whole = True
            self.optimizer.bad = 0
            raise
        self.step += 1
        self.number += 1
        self.position += 1
        self.random_state = self.generator.get_state()
        self.history.append(loss)
        self.whole = True
        return note

    def choose(self, replaced: Collection[str], start: float) -> None:
        """Go on with the blocks of these sites alone, for the steps from `start` on."""
        self.student.keep(replaced, start)
        self.replaced = tuple(self.student.blocks)
        self.restart_optimizer()

    def adopt(self, settings: DistillationSettings) -> None:
        """Go on by these settings, which may have other steps alone."""
        self.settings = settings
        self.optimizer.stage = settings.stage(self.stage)

    def begin_joint(self) -> None:
        """Go on from the averaged weights in the joint stage, with a new optimizer."""
        self.student.adopt_average()
        self.stage, self.step, self.keeps = "joint", 0, True
        self.student.restart_average()
        self.restart_optimizer()

    def restart_optimizer(self) -> None:
        """Forget the moments, for weights that no step has made."""
        self.optimizer = self._new_optimizer()

    def state(self, parts: int) -> State:
        """What the last whole step left, and the memory policy's factor as `parts`."""
        history = torch.tensor(self.history, dtype=torch.float64)
        tensors = {"rng": self.random_state, "history": history}
        groups = (
            ("weights", self.student.parameters),
            ("ema", self.student.ema),
            # A saved name.
            ("optimiser", self.optimizer.tensors()),
        )
        for group, members in groups:
            tensors |= {f"{group}.{name}": tensor for name, tensor in members.items()}
        progress = Progress(
            stage=self.stage,
            step=self.step,
            position=self.position,
            number=self.number,
            averaged=self.student.averaged,
            parts=parts,
            bad=self.optimizer.bad,
            rate=self.optimizer.rate,
            scaler=self.optimizer.scaler.state_dict(),
            settings=self.settings.to_mapping(),
            replaced=self.replaced,
            start=self.student.start,
            keeps=self.keeps,
        )
        return State(tensors, progress)

    def take_up(self, state: State) -> list[str]:
        """Continue from `state`; returns notes of what it does not continue."""
        notes, progress = [], state.progress
        self.stage, self.step = progress.stage, progress.step
        self.position, self.number = progress.position, progress.number
        if progress.replaced is not None:
            self.choose(progress.replaced, progress.start)
        self.student.load(state.group("weights"))
        self.student.ema = {
            name: tensor.to(self.student.device) for name, tensor in state.group("ema").items()
        }
        self.student.averaged = progress.averaged
        self.restart_optimizer()
        if not self.optimizer.load(state.group("optimiser")):
            notes.append("optimizer begun anew: the state holds another kind's moments")
        self.optimizer.bad, self.optimizer.rate = progress.bad, progress.rate
        if progress.scaler and self.optimizer.scaler.is_enabled():
            self.optimizer.scaler.load_state_dict(dict(progress.scaler))
        self.random_state = state.tensors["rng"]
        self.generator.set_state(self.random_state)
        self.history = state.tensors["history"].tolist()
        notes.append(f"resumed after {self.number} steps")
        if self.settings.matches(progress.settings):
            self.keeps = progress.keeps
        else:
            notes.append("with other settings than it was begun with")
        return notes

    def _new_optimizer(self) -> Optimizer:
        scaled = self.half_base and self.stage == "joint"
        return Optimizer(self.student, self.settings.stage(self.stage), self.settings, scaled)
