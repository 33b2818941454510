"""Live display of a distillation: progress with time left, samples, the loss curve."""

import logging
import time

import comfy.model_management
import comfy.utils
import latent_preview
import torch

from ...deltaconv.distillation import Dataset, Record, sample
from ...deltaconv.distillation.plots import progress_picture
from ...deltaconv.memory import is_out_of_memory
from .messages import say
from .node_text import show_error, show_on_node
from .teacher import ComfyTeacher

_STEPS = 12
_MOST = 2
_AT = {
    "init": "at initialization",
    "choice": "at choice",
    "plan": "at initialization",
    "layers": "at layers",
    "joint": "at joint",
}


class LivePreview:
    """Progress of samples, initialization and steps; a picture every `every` steps (0: none).

    `dataset` is set before the first step is shown; `folder` is the name to resume by; `planned`
    tells that steps are known only after a record of the plan.
    """

    dataset: Dataset

    def __init__(
        self,
        teacher: ComfyTeacher,
        every: int,
        folder: str = "",
        planned: bool = False,
    ):
        self.folder, self.at, self.drew = folder, "", False
        self.teacher, self.every, self.planned = teacher, every, planned
        self.bar = comfy.utils.ProgressBar(1)
        self.began: tuple[float, int] | None = None
        # The teacher's samples, drawn once.
        self.pictures: list = []
        self.said = 0.0

    def drawn(self, done: int, total: int) -> None:
        """`done` of `total` steps of drawing own samples are done."""
        self.at, self.drew = say("at samples", share=f"{done / total:.0%}"), True
        self._move(done, total)
        self._say(self.at)

    def initialized(self, share: float) -> None:
        """Show the share of the initialization done; raises if the queue was interrupted."""
        self.at = say("at initialization", share=f"{share:.0%}")
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._move(round(100 * share), 100)
        self._say(self.at)

    def choosing(self, share: float) -> None:
        """Show the share of the choice of layers done; raises if the queue was interrupted."""
        self.at = say("at choice", share=f"{share:.0%}")
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._move(round(100 * share), 100)
        self._say(self.at)

    def show(self, record: Record) -> None:
        """Advance the bar, and draw samples every `every` steps; raises if interrupted."""
        settings = record.settings
        total = 1 + settings.layers.steps + settings.joint.steps
        done = 1 + record.step if record.stage == "layers" else record.step
        if record.stage == "joint":
            done += 1 + settings.layers.steps
        self.planned = self.planned and record.stage in ("init", "choice")
        ended = done == total and not self.planned
        if record.stage not in ("layers", "joint"):
            # What comes before the steps says nothing of their pace.
            self.began = None
        # Records before the steps come when their part is done.
        self.at = say(_AT[record.stage], step=record.step, steps=record.steps, share="100%")
        text = say("loss", at=self.at, loss=f"{record.loss:.4g}")
        if left := self._left(done, total):
            text = say("left", at=text, time=left)
        preview = None
        if self.every and (record.step % self.every == 0 or ended):
            preview = self._preview(record, text)
        self._move(done, total, preview)
        self._say(text, at_once=ended)
        if not ended:
            # A step that learns from kept passes calls no model, which would ask.
            comfy.model_management.throw_exception_if_processing_interrupted()

    def stopped(self, error: BaseException, saved: int | None) -> None:
        """Show where it stopped, what is saved, and how to go on.

        `saved` is the number of steps of the newest state, None without one.
        """
        interrupted = isinstance(error, comfy.model_management.InterruptProcessingException)
        where = self._where("interrupted" if interrupted else "failed", saved)
        if interrupted:
            show_on_node(where)
        else:
            show_error(error, where)

    def _where(self, how: str, saved: int | None) -> str:
        if not self.at:
            # A state in the folder may belong to another distillation.
            return say(f"{how} before", folder=self.folder)
        if saved is None:
            return say(f"{how} with samples" if self.drew else f"{how} unsaved", at=self.at)
        if not saved:
            return say(f"{how} initialized", at=self.at, folder=self.folder)
        return say(f"{how} saved", at=self.at, steps=saved, folder=self.folder)

    def _left(self, done: int, total: int) -> str:
        """Time left, from the pace since this run's first step; "" before the second."""
        now = time.monotonic()
        if self.began is None:
            self.began = (now, done)
        since, first = self.began
        return _duration((now - since) / (done - first) * (total - done)) if done > first else ""

    def _move(self, done: int, total: int, preview: tuple | None = None) -> None:
        # Make a new bar for each total: the page never moves a bar back.
        if self.bar.total != total:
            self.bar = comfy.utils.ProgressBar(total)
        self.bar.update_absolute(done, total, preview)

    def _say(self, text: str, at_once: bool = False) -> None:
        """Write a line on the node, at most once a second."""
        now = time.monotonic()
        if at_once or now > self.said + 1:
            self.said = now
            show_on_node(say("folder", at=text, folder=self.folder))

    def _preview(self, record: Record, text: str) -> tuple | None:
        try:
            return ("JPEG", self._picture(record, text), 1024)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Only the preview ran out of memory: train on without pictures.
            logging.warning("ΔConv: out of memory for preview pictures, going on without them.")
            self.every = 0
            return None

    def _picture(self, record: Record, text: str):
        count = min(_MOST, len(self.dataset.latents))
        shape = self.dataset.latents[0].shape
        generator = torch.Generator().manual_seed(record.settings.seed)
        noise = torch.randn((count, *shape), generator=generator)
        conditions = list(self.dataset.conditions[:count])
        arguments = (self.teacher, conditions, self.dataset.unconditional, noise)
        cfg = 4.0 if record.settings.unconditional else 1.0
        if not self.pictures:
            teachers = sample(*arguments, steps=_STEPS, cfg=cfg)
            self.pictures = [decoded(self.teacher, latent) for latent in teachers]
        student = record.student
        students = sample(
            *arguments, steps=_STEPS, cfg=cfg, visit=student.visit, start=student.start
        )
        drawn = [decoded(self.teacher, latent) for latent in students]
        pairs = list(zip(self.pictures, drawn, strict=True))
        layers = len(record.history) - (record.step if record.stage == "joint" else 0)
        losses = [
            ("layers" if step < layers else "joint", loss)
            for step, loss in enumerate(record.history)
        ]
        return progress_picture(losses, pairs, text)


def decoded(teacher: ComfyTeacher, latent: torch.Tensor):
    """latent [C, H, W] → a small PIL picture, as ComfyUI previews latents of this kind."""
    if latent.shape[0] == 3:
        return latent_preview.preview_to_image(latent.movedim(0, -1).float())
    previewer = latent_preview.get_previewer(teacher.device, teacher.patcher.model.latent_format)
    if previewer is None:
        # Previews are off: show the first channels.
        return latent_preview.preview_to_image(latent[:3].movedim(0, -1).float())
    return previewer.decode_latent_to_preview(teacher.with_frame(latent[None]))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
