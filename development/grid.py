"""The demo's sheet of pictures: a column per prompt, teacher above student, figures under each."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

TILE, GAP, LABELS, LINE = 256, 20, 250, 34
COLUMNS = 6
INK, FAINT, PAPER, EDGE = "#1b1b1f", "#6a6a73", "#ffffff", "#d9d9e0"


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
    """The sheet as RGB; `rows` holds a name and a remark for the teacher's and the student's row.

    Pictures are enlarged by a whole factor without smoothing, so every pixel stays what it was.
    """
    bands = [pairs[start : start + COLUMNS] for start in range(0, len(pairs), COLUMNS)]
    band_height = 2 * LINE + 2 * (TILE + GAP) + LINE + GAP
    width = GAP + LABELS + min(len(pairs), COLUMNS) * (TILE + GAP)
    # Few prompts still leave room for the title and the footer.
    width = max(width, GAP * 2 + int(max(_font(26).getlength(title), _font(18).getlength(footer))))
    height = GAP + LINE + len(bands) * band_height + LINE + GAP // 2
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, INK, _font(26))
    for index, band in enumerate(bands):
        _draw_band(sheet, draw, band, rows, GAP + LINE + index * band_height)
    draw.text((GAP, height - LINE - GAP // 2), footer, FAINT, _font(18))
    return sheet


def _draw_band(sheet, draw, pairs, rows, top: int) -> None:
    pictures_at = top + 2 * LINE
    for row, (name, remark) in enumerate(rows):
        middle = pictures_at + row * (TILE + GAP) + TILE // 2
        draw.text((GAP, middle - LINE), name, INK, _font(24))
        draw.text((GAP, middle + 2), remark, FAINT, _font(18))
    for column, pair in enumerate(pairs):
        left = GAP + LABELS + column * (TILE + GAP)
        heading = "\n".join(textwrap.wrap(pair.prompt or "(no prompt)", 20)[:2])
        at = (left + TILE // 2, pictures_at - 10)
        draw.text(at, heading, INK, _font(20), anchor="md", align="center")
        for row, picture in enumerate((pair.teacher, pair.student)):
            corner = (left, pictures_at + row * (TILE + GAP))
            factor = max(1, TILE // max(picture.size))
            size = (picture.width * factor, picture.height * factor)
            sheet.paste(picture.resize(size, Image.Resampling.NEAREST), corner)
            draw.rectangle((*corner, corner[0] + size[0], corner[1] + size[1]), outline=EDGE)
        below = pictures_at + 2 * (TILE + GAP) - GAP // 2
        draw.text((left + TILE // 2, below), pair.caption, FAINT, _font(18), anchor="ma")


def _font(size: int) -> ImageFont.FreeTypeFont:
    # The font that comes with matplotlib has the Δ; Pillow's own has not.
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
