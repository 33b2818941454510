"""The demo's sheet of pictures: a column per prompt, a row per model, a line under each picture."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..deltaconv.pictures.sheet import sheet, stacked

COLUMNS = 6
_TEXT = 19


@dataclass(frozen=True)
class Column:
    """One prompt's pictures of one size, and the line under each."""

    prompt: str
    pictures: Sequence[Image.Image]
    captions: Sequence[str]


def draw_grid(
    columns: Sequence[Column], rows: Sequence[tuple[str, str]], title: str, footer: str
) -> Image.Image:
    """The sheet as RGB; `rows` are name and remark of each row of pictures."""
    bands = [columns[start : start + COLUMNS] for start in range(0, len(columns), COLUMNS)]
    names = [f"{name}\n{remark}" for name, remark in rows]
    parts = [
        sheet(
            [list(row) for row in zip(*(column.pictures for column in band), strict=True)],
            columns=[column.prompt or "(no prompt)" for column in band],
            names=names,
            captions=[list(row) for row in zip(*(column.captions for column in band), strict=True)],
            size=_TEXT,
        )
        for band in bands
    ]
    return stacked(parts, title, footer, _TEXT)
