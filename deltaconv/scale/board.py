"""A distillation for TensorBoard: losses per site, learning rate, throughput, memory, pictures."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..distillation.record import Record
from ..distillation.settings import DistillationError
from ..distillation.teacher import Teacher, sample

# Of the sampling behind a picture, and how many pictures.
_STEPS, _MOST = 12, 4


class Board:
    """Event files in `folder`; a resumed run takes the place of what it does again.

    Every `every` steps (0: never) it draws samples [C, H, W] of teacher and student from the same
    noise, one per condition, which `decode` makes Pillow pictures of.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Teacher,
        conditions: Sequence[object],
        unconditional: object,
        shape: tuple[int, ...],
        decode: Callable[[torch.Tensor], Any],
        every: int = 0,
    ):
        if find_spec("tensorboard") is None:
            raise DistillationError(
                "Expected TensorBoard for the entry tensorboard, got none installed. Install the "
                "pack with its extra [train], or leave the entry out."
            )
        self.folder, self.teacher, self.every = folder, teacher, every
        self.conditions, self.unconditional = list(conditions[:_MOST]), unconditional
        self.shape, self.decode = shape, decode
        self._writer: Any = None
        self._teachers: torch.Tensor | None = None

    def add(self, record: Record) -> None:
        """Write what a record says, under the number of steps so far."""
        number = len(record.history)
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=number)
        scalars = {f"{record.stage}/{name}": loss for name, loss in record.losses.items()}
        scalars["loss"] = record.loss
        if record.stage in ("layers", "joint"):
            scalars |= {"lr": record.lr, "images_per_second": record.images_per_second}
        if record.memory is not None:
            scalars["memory_gib"] = record.memory / 2**30
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, number)
        if record.message:
            self._writer.add_text("message", record.message, number)
        training = record.stage in ("layers", "joint")
        if self.every and training and (number % self.every == 0 or record.step == record.steps):
            self._add_pictures(record, number)

    def close(self) -> None:
        """Write all that is left."""
        if self._writer is not None:
            self._writer.close()

    def _add_pictures(self, record: Record, number: int) -> None:
        generator = torch.Generator().manual_seed(record.settings.seed)
        noise = torch.randn((len(self.conditions), *self.shape), generator=generator)
        arguments = (self.teacher, self.conditions, self.unconditional, noise)
        cfg = 4.0 if record.settings.unconditional else 1.0
        if self._teachers is None:
            self._teachers = sample(*arguments, steps=_STEPS, cfg=cfg)
            self._write("pictures/teacher", self._teachers, number)
        student = record.student
        students = sample(
            *arguments, steps=_STEPS, cfg=cfg, visit=student.visit, start=student.start
        )
        self._write("pictures/student", students, number)

    def _write(self, name: str, latents: torch.Tensor, number: int) -> None:
        import numpy as np

        pictures = np.stack([np.asarray(self.decode(latent)) for latent in latents])
        self._writer.add_images(name, pictures, number, dataformats="NHWC")
