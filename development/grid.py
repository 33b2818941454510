"""The demo's sheet of pictures: a column per prompt, teacher above student, figures under each."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..deltaconv.pictures.sheet import sheet, stacked

COLUMNS = 6
_TEXT = 19


@dataclass(frozen=True)
class Pair:
    """One prompt's two pictures of one size, and the line that stands under them."""

    prompt: str
    teacher: Image.Image
    student: Image.Image
    caption: str


def draw_grid(
    pairs: Sequence[Pair], rows: Sequence[tuple[str, str]], title: str, footer: str
) -> Image.Image:
    """The sheet as RGB; `rows` are name and remark of the teacher's and the student's row."""
    bands = [pairs[start : start + COLUMNS] for start in range(0, len(pairs), COLUMNS)]
    names = [f"{name}\n{remark}" for name, remark in rows]
    parts = [
        sheet(
            [[pair.teacher for pair in band], [pair.student for pair in band]],
            columns=[pair.prompt or "(no prompt)" for pair in band],
            names=names,
            captions=[[""] * len(band), [pair.caption for pair in band]],
            size=_TEXT,
        )
        for band in bands
    ]
    return stacked(parts, title, footer, _TEXT)
