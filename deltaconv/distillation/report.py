"""A distillation's report, accumulated from its records without keeping them."""

from pathlib import Path

from ..markdown import bullets
from .record import Record

_MESSAGES = 20


class DistillationReport:
    """The results of each stage, the guards' messages, and the place of the state."""

    def __init__(self):
        self._initial: float | None = None
        self._losses: dict[str, list[float]] = {}
        self._seconds: dict[str, float] = {}
        self._images: dict[str, float] = {}
        self._worst: list[tuple[str, float]] = []
        self._messages: list[str] = []
        self._data = self._choice = ""

    def add(self, record: Record) -> None:
        """Add one record."""
        stage = record.stage
        if record.message and len(self._messages) < _MESSAGES:
            at = f"{stage} {record.step}" if stage in ("layers", "joint") else stage
            self._messages.append(f"{at}: {record.message}")
        if not record.losses:
            return
        if stage == "init":
            self._initial = record.loss
            return
        self._losses.setdefault(stage, []).append(record.loss)
        self._seconds[stage] = self._seconds.get(stage, 0.0) + record.seconds
        images = record.images_per_second * record.seconds
        self._images[stage] = self._images.get(stage, 0.0) + images
        if stage == "layers":
            self._worst = sorted(record.losses.items(), key=lambda item: -item[1])[:3]

    def own_samples(self, count: int, reused: int) -> None:
        """Tell how many of `count` own samples came from the cache."""
        self._data = (
            f"own samples: {count} drawn"
            if not reused
            else f"own samples: {reused} of {count} reused from an earlier run"
        )

    def chosen(self, sentence: str) -> None:
        """Tell which layers and steps were chosen."""
        self._choice = sentence

    def out_of_time(self, record: Record) -> None:
        """Tell that the time was over at this record."""
        self._messages.append(
            f"stopped at {record.stage} step {record.step} of {record.steps}, when its time was "
            "over: steps became slower than they were measured. Queue again to go on"
        )

    def text(self, folder: Path | None, seconds: float) -> str:
        """The report after `seconds` in all, a list in Markdown."""
        lines = [self._data] if self._data else []
        if self._initial is not None:
            lines.append(
                "informed initialization: mean relative error of the layers on held-out "
                f"draws {self._initial:.4f}"
            )
        if self._choice:
            lines.append(f"choice: {self._choice}")
        for stage, losses in self._losses.items():
            tail = max(1, len(losses) // 10)
            first, last = sum(losses[:tail]) / tail, sum(losses[-tail:]) / tail
            rate = self._images[stage] / max(self._seconds[stage], 1e-9)
            lines.append(
                f"{stage}: {len(losses)} steps, loss {first:.5g} → {last:.5g} (means of {tail}), "
                f"{rate:.1f} images per second"
            )
            if stage == "layers":
                worst = ", ".join(f"{site} {loss:.4f}" for site, loss in self._worst)
                lines.append(f"worst: {worst}")
        lines += self._messages
        place = f"; state in `{folder}`" if folder else ""
        return bullets([*lines, f"{seconds:.0f} s in all{place}"])
