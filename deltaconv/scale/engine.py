"""A distillation on many processes: each takes its share of every batch, through Accelerate.

All processes draw the same batches and take the same steps. What they exchange are gradients, by
DistributedDataParallel, and a few sums per step. A step is the forward of a module, since gradients
are only exchanged for a forward that DistributedDataParallel has seen, and a patched base has none.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..distillation.checkpoint import Checkpoints
from ..distillation.data import Batch, part_sizes
from ..distillation.engine import Engine
from ..distillation.losses import LayerLosses, joint_losses
from ..distillation.memory_policy import MemoryPolicy
from ..distillation.settings import DistillationError, StageSettings
from ..distillation.student import Optimizer, Student
from ..distillation.teacher import Teacher
from ..distillation.training import Training
from ..memory import is_out_of_memory
from .checkpoint import Processes, ShardedCheckpoints, sharded_states

_T = TypeVar("_T")
_TINY = 1e-12
# Seconds after which a process that does not answer ends the job.
STALL = 600.0


def processes() -> int:
    """How many processes torchrun or `accelerate launch` started together; 1 without them."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def chosen_engine(folder: Path, stall: float = STALL) -> Engine:
    """For a run with states in `folder`: of all processes that were started, or of this one."""
    if processes() > 1:
        return ParallelEngine(stall)
    return OneProcessEngine() if sharded_states(folder) else Engine()


class OneProcessEngine(Engine):
    """This process alone, which goes on with what several began."""

    def checkpoints(self, folder: Path | None, identity: Mapping[str, object]) -> Checkpoints:
        """States that any number of processes takes up."""
        return ShardedCheckpoints(folder, identity)


class ParallelEngine(Engine):
    """The processes that were started together; made once per process, before the model is loaded.

    A process that ends takes the others with it, by the launcher; one that hangs does so within
    `stall` seconds.
    """

    alone = False

    def __init__(self, stall: float = STALL):
        super().__init__()
        try:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
        except ImportError:
            raise DistillationError(
                f"Expected Accelerate for {processes()} processes, got none installed. Install the "
                "pack with its extra [train], or start the command alone."
            ) from None
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=stall)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        self.count = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.main = self.accelerator.is_main_process
        self._asked = False
        # The module that exchanges gradients, and the optimizer whose parameters these are.
        self._step: torch.nn.Module | None = None
        self._optimizer: Optimizer | None = None

    def close(self) -> None:
        """Leave the processes: before this one ends without an error."""
        self._step = None
        self.accelerator.end_training()

    def ask_to_stop(self) -> None:
        """Stop all processes after the step that they are in, or the next; safe in a handler."""
        self._asked = True

    def shared(self, decide: Callable[[], _T]) -> _T:
        """What `decide` returns in the first process, which alone is asked."""
        from accelerate.utils import broadcast_object_list

        decided: list[Any] = [decide() if self.main else None]
        broadcast_object_list(decided)
        return decided[0]

    def checkpoints(self, folder: Path | None, identity: Mapping[str, object]) -> Checkpoints:
        """States that any number of processes takes up."""
        return ShardedCheckpoints(folder, identity, _Accelerated(self.accelerator))

    def rows(self, stage: StageSettings) -> list[int]:
        """This process's images of each part of a batch, in turn."""
        return [row for part in self._parts(stage) for row in part]

    def _parts(self, stage: StageSettings) -> list[range]:
        """For each part of a batch, the rows of it that this process takes: at least one."""
        sizes = part_sizes(stage.batch, stage.accumulate)
        if min(sizes) < self.count:
            raise DistillationError(
                f"Expected every part of a batch to have an image for each of {self.count} "
                f"processes, got a batch of {stage.batch} in parts of {sizes}. Set a larger batch, "
                "a smaller accumulate, or start fewer processes."
            )
        parts, first = [], 0
        for size in sizes:
            here, following = (size * at // self.count for at in (self.rank, self.rank + 1))
            parts.append(range(first + here, first + following))
            first += size
        return parts

    def within_memory(
        self, memory: MemoryPolicy, stage: StageSettings, compute: Callable[[], _T]
    ) -> _T:
        """What `compute` returns of this process's share of a batch.

        Raises DistillationError where memory runs out: the others could not take smaller parts.
        """
        try:
            return compute()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            images, parts = len(self.rows(stage)), len(self._parts(stage))
            raise DistillationError(
                f"Expected memory for {images} images in {parts} parts, got too little. Set a "
                "larger accumulate, a smaller batch, checkpointing, or start more processes; the "
                "last state goes on."
            ) from error

    def losses(
        self, teacher: Teacher, training: Training, batch: Batch, parts: int, joint: bool
    ) -> dict[str, float]:
        """The losses of the whole batch, whose gradients are then set; `batch` holds `rows`."""
        stage = training.settings.stage("joint" if joint else "layers")
        step = self._wrapped(training)
        # With many processes the parts are those of the settings: `parts` could differ.
        mine = list(batch.split([len(rows) for rows in self._parts(stage)]))
        if not joint:
            total, losses = step(lambda: self._layers(teacher, training, mine, stage.batch))
            # Its gradients were scaled when they were computed.
            total.backward()
            return losses
        sums: dict[str, torch.Tensor] = {}
        sizes = part_sizes(stage.batch, stage.accumulate)
        for number, (part, size) in enumerate(zip(mine, sizes, strict=True), 1):
            here = self._joint(teacher, training, part, size, stage.batch)
            if number < len(mine):
                with self.accelerator.no_sync(step):
                    total, found = step(here)
                    training.optimizer.backward(total)
            else:
                total, found = step(here)
                training.optimizer.backward(total)
            for name, loss in found.items():
                weighted = loss.double() * (len(part) / stage.batch)
                sums[name] = sums[name] + weighted if name in sums else weighted
        summed = self._sum(torch.stack(list(sums.values())))
        return dict(zip(sums, summed.tolist(), strict=True))

    def _joint(
        self, teacher: Teacher, training: Training, part: Batch, size: int, images: int
    ) -> Callable[[], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """The loss of this process's share of a part of `size` images, and its losses by name."""

        def pooled(powers: torch.Tensor) -> torch.Tensor:
            return self.accelerator.reduce(powers * (len(part) / size), "sum")

        def compute() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            total: list[torch.Tensor] = []
            # DistributedDataParallel takes the mean over processes; the step wants the sum.
            share = self.count * len(part) / images
            student, settings = training.student, training.settings
            losses = joint_losses(teacher, student, part, share, total.append, settings, pooled)
            return total[0], losses

        return compute

    def _layers(
        self, teacher: Teacher, training: Training, parts: Iterable[Batch], images: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """A loss whose gradients are computed already, layer by layer, and the losses by site."""
        student = training.student
        parameters = list(student.parameters.values())
        gradients = [torch.zeros_like(parameter) for parameter in parameters]

        def collect(loss: torch.Tensor) -> None:
            scaled = training.optimizer.scaler.scale(loss)
            found = torch.autograd.grad(scaled, parameters, allow_unused=True)
            for gradient, more in zip(gradients, found, strict=True):
                if more is not None:
                    gradient.add_(more)

        layers = LayerLosses(student, images, collect)
        for part in parts:
            layers.add(teacher, part)
        sites = list(student.blocks)
        here = [torch.stack([of[site] for site in sites]) for of in (layers.errors, layers.powers)]
        errors, powers = self._sum(torch.cat(here)).chunk(2)
        powers = powers.clamp_min(_TINY)
        # From the first part's power here to that of the whole batch; a mean follows, not a sum.
        units = torch.stack([layers.units[site] for site in sites])
        factors = dict(zip(sites, self.count * units.clamp_min(_TINY) / powers, strict=True))
        owners = [site for site, block in student.blocks.items() for _ in block.parameters()]
        for gradient, site in zip(gradients, owners, strict=True):
            gradient.mul_(factors[site])
        losses = dict(zip(sites, (errors / powers).tolist(), strict=True))
        return _Computed.apply(gradients, *parameters), losses

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """values [N] summed over the processes, which agree on the way whether to stop."""
        asked = values.new_full((1,), float(self._asked))
        summed = self.accelerator.reduce(torch.cat([values.detach(), asked]), "sum")
        self.stopping = self.stopping or bool(summed[-1] > 0)
        return summed[:-1]

    def _wrapped(self, training: Training) -> torch.nn.Module:
        """The module that exchanges gradients; it takes the first process's weights when made."""
        if self._step is None or self._optimizer is not training.optimizer:
            self.accelerator.free_memory()
            step = _Step(training.student)
            self._step = self.accelerator.prepare_model(step, device_placement=False)
            self._optimizer = training.optimizer
            if not training.student.averaged:
                training.student.restart_average()
        return self._step


class _Accelerated(Processes):
    """All processes of an Accelerator."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        self.main = accelerator.is_main_process

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def gather(self, value: _T) -> list[_T]:
        """`value` of every process, in their order."""
        from accelerate.utils import gather_object

        return gather_object([value])


class _Step(torch.nn.Module):
    """A training step as a forward: what computes a loss of these blocks is its argument."""

    def __init__(self, student: Student):
        super().__init__()
        self.blocks = torch.nn.ModuleList(student.blocks.values())

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


class _Computed(torch.autograd.Function):
    """0, with gradients that were computed before: `gradients[i]` for `parameters[i]`."""

    @staticmethod
    def forward(ctx, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx, *unused: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.gradients
