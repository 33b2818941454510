"""Sheets: pictures in rows and columns under titles, and sheets under each other."""

import importlib.util
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_GAP = 16
_INK, _FAINT, _PAPER, _EDGE = "#1b1b1f", "#6a6a73", "#ffffff", "#d9d9e0"
_SMALLEST_TEXT = 14
_MOST_LINES = 3
# In characters; a longer name would make the page wider.
_LONGEST_TEXT = 300

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    tile: int = 256,
    size: int | None = None,
) -> Image.Image:
    """Rows of equally many pictures → one RGB picture.

    `columns` stand above, `names` left of their row (what follows a line break in gray), `captions`
    are rows of texts below the pictures. Pictures narrower than `tile` are enlarged by a whole
    factor without smoothing, so that every pixel stays what it was. `size` is that of the text.
    """
    tiles = [[_enlarged(picture, tile) for picture in row] for row in rows]
    width = max(picture.width for row in tiles for picture in row)
    size = size or max(_SMALLEST_TEXT, width // 18)
    small, large = font(size), font(round(1.35 * size))
    names = [_shown(name) for name in names]
    columns = [_wrapped(title, small, width) for title in columns]
    captions = [[_wrapped(caption, small, width) for caption in row] for row in captions]
    left = _GAP
    if names:
        lines = [name.partition("\n") for name in names]
        left += _GAP + math.ceil(
            max(max(large.getlength(name), small.getlength(more)) for name, _, more in lines)
        )
    top = _GAP // 2 + _height(columns, size)
    # Rows of pictures, each with its captions or a gap below.
    tops, heights = [], [max(picture.height for picture in row) for row in tiles]
    for row, height in enumerate(heights):
        tops.append(top)
        top += height + (_GAP + _height(captions[row], size) if captions else _GAP)
    page = Image.new("RGB", (left + max(map(len, tiles)) * (width + _GAP), top), _PAPER)
    draw = ImageDraw.Draw(page)
    for row, (pictures, top, height) in enumerate(zip(tiles, tops, heights, strict=True)):
        if names:
            name, _, more = names[row].partition("\n")
            middle = top + height // 2
            draw.text((_GAP, middle), name, _INK, large, anchor="ld" if more else "lm")
            draw.text((_GAP, middle + size // 3), more, _FAINT, small)
        for column, picture in enumerate(pictures):
            x = left + column * (width + _GAP)
            edge = (x - 1, top - 1, x + picture.width, top + picture.height)
            draw.rectangle(edge, outline=_EDGE)
            page.paste(picture, (x, top))
            if captions:
                below = (x + width // 2, top + height + size // 3)
                _centered(draw, below, captions[row][column], _FAINT, small, "ma")
    for column, title in enumerate(columns):
        above = (left + column * (width + _GAP) + width // 2, tops[0] - size // 3)
        _centered(draw, above, title, _INK, small, "md")
    return page


def stacked(
    parts: Sequence[Image.Image], title: str = "", footer: str = "", size: int = 18
) -> Image.Image:
    """Pictures below each other on white, between two lines of text of that size."""
    title, footer = _shown(title), _shown(footer)
    texts = ((title, _INK, font(round(1.35 * size))), (footer, _FAINT, font(size)))
    width = max(
        *(part.width for part in parts),
        *(2 * _GAP + math.ceil(face.getlength(text)) for text, _, face in texts),
    )
    margins = [2 * size if text else 0 for text in (title, footer)]
    height = _GAP + sum(margins) + sum(part.height for part in parts)
    page = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(page)
    top = _GAP // 2 + margins[0]
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    for y, (text, color, face) in zip((_GAP // 2, top), texts, strict=True):
        draw.text((_GAP, y), text, color, face)
    return page


def font(size: int) -> Font:
    """DejaVu Sans, as matplotlib brings it, or a font of the system; Pillow's own has no Δ."""
    names = ["DejaVuSans.ttf", "Arial.ttf", "arial.ttf", "LiberationSans-Regular.ttf"]
    # Located without importing matplotlib, which takes longer than drawing.
    if (found := importlib.util.find_spec("matplotlib")) and found.origin:
        names.insert(0, str(Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"))
    for name in names:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _enlarged(picture: Image.Image, tile: int) -> Image.Image:
    factor = max(1, math.ceil(tile / picture.width))
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _wrapped(text: str, face: Font, width: int) -> str:
    """`text` in lines of about `width` pixels, the last one cut where there are too many."""
    letters = max(8, int(width / face.getlength("e")))
    lines = textwrap.wrap(_shown(text), letters, max_lines=_MOST_LINES, placeholder=" …")
    return "\n".join(lines)


def _shown(text: str) -> str:
    """`text` as it can be drawn: prompts and labels may hold what no font draws, at any length."""
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + " …"
    return "".join(each if each.isprintable() or each == "\n" else " " for each in text)


def _height(texts: Sequence[str], size: int) -> int:
    """Pixels that the highest of the texts takes."""
    lines = max((text.count("\n") + 1 for text in texts if text), default=0)
    return round(1.4 * size * lines) + size // 3 if lines else 0


def _centered(draw: ImageDraw.ImageDraw, at, text: str, color: str, face: Font, anchor: str):
    draw.multiline_text(at, text, color, face, anchor=anchor, align="center")
