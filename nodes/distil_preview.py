"""What a running distillation shows in ComfyUI: progress with time left, pictures, the curve."""

import logging
import time

import comfy.utils
import latent_preview
import torch

from ..deltaconv.distil import Record, sample
from ..deltaconv.distil.plots import progress_picture
from ..deltaconv.distil.record import is_out_of_memory

_STEPS = 12
_MOST = 2


class LivePreview:
    """Progress of all stages as one bar, and a picture every `every` steps (0: none)."""

    def __init__(self, teacher, dataset, settings, every: int):
        self.teacher, self.dataset, self.every = teacher, dataset, every
        self.settings = settings
        self.total = 1 + settings.layers.steps + settings.joint.steps
        self.bar = comfy.utils.ProgressBar(self.total)
        self.started, self.first = time.monotonic(), None
        self.losses: list[tuple[str, float]] = []
        self.pictures: list = []

    def show(self, record: Record) -> None:
        """Move the bar; every so often draw what the student draws by now."""
        done = 1 + record.step if record.stage == "layers" else record.step
        if record.stage == "joint":
            done += 1 + self.settings.layers.steps
        if record.stage != "init":
            self.losses.append((record.stage, record.loss))
        if self.first is None:
            self.first = done
        preview = None
        if self.every and (record.step % self.every == 0 or done == self.total):
            preview = self._preview(record, done)
        self.bar.update_absolute(done, self.total, preview)

    def _preview(self, record: Record, done: int):
        try:
            return ("JPEG", self._picture(record, done), 1024)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # The training fits; pictures are not worth losing it.
            logging.warning("ΔConv: out of memory for preview pictures, going on without them.")
            self.every = 0
            return None

    def _picture(self, record: Record, done: int):
        count = min(_MOST, len(self.dataset.latents))
        shape = self.dataset.latents[0].shape
        generator = torch.Generator().manual_seed(self.settings.seed)
        noise = torch.randn((count, *shape), generator=generator)
        conditions = list(self.dataset.conditions[:count])
        arguments = (self.teacher, conditions, self.dataset.unconditional, noise)
        cfg = 4.0 if self.settings.unconditional else 1.0
        if not self.pictures:
            teachers = sample(*arguments, steps=_STEPS, cfg=cfg)
            self.pictures = [self._decode(latent) for latent in teachers]
        students = sample(*arguments, steps=_STEPS, cfg=cfg, visit=record.student.visit)
        rate = (time.monotonic() - self.started) / max(1, done - self.first + 1)
        return progress_picture(
            self.losses,
            list(zip(self.pictures, map(self._decode, students), strict=True)),
            f"{record.stage} {record.step}/{record.steps}, loss {record.loss:.4g}, "
            f"{_duration(rate * (self.total - done))} left",
        )

    def _decode(self, latent: torch.Tensor):
        """latent [C, H, W] → a small PIL picture, as ComfyUI previews latents of this kind."""
        if latent.shape[0] == 3:
            return latent_preview.preview_to_image(latent.movedim(0, -1).float())
        previewer = latent_preview.get_previewer(
            self.teacher.device, self.teacher.patcher.model.latent_format
        )
        if previewer is None:
            # Previews are switched off: the first channels still show shapes.
            return latent_preview.preview_to_image(latent[:3].movedim(0, -1).float())
        return previewer.decode_latent_to_preview(latent[None])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
