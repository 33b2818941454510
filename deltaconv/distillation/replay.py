"""Repeated runs of the teacher over the same images, for initialization and refits."""

from collections.abc import Callable

import torch

from .data import Dataset, draw
from .initialization import Replay
from .settings import DistillationSettings
from .teacher import Teacher, Visit


def replay_of(
    teacher: Teacher,
    dataset: Dataset,
    settings: DistillationSettings,
    parts: Callable[[], int],
    start: float,
) -> Replay:
    """Runs the teacher over `init_images`, apart from the training's own order of images.

    Every batch is computed in `parts()` parts, as in the layers stage. Each turn has its own noise
    and begins at the image where the turn before it ended. `start` is `draw`'s.
    """
    batch, seed = settings.layers.batch, settings.seed ^ 0x5EED

    def replay(visit: Visit, turn: int, first_batch_only: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed + turn)
        count = -(-settings.init_images // batch)
        first = turn * count
        for position in range(first, first + (1 if first_batch_only else count)):
            inputs = draw(
                dataset,
                teacher,
                generator,
                seed=seed,
                batch=batch,
                position=position,
                unconditional=settings.unconditional,
                start=start,
            )
            for part in inputs.parts(parts()):
                with torch.no_grad():
                    teacher.predict(part.x, part.sigma, part.conditions, visit)

    return replay
