"""Sheets hold every picture, pixel for pixel, and room for every text."""

import itertools

import numpy as np
import pytest
from comfyui_deltaconv.deltaconv.pictures.sheet import sheet, stacked
from PIL import Image


def picture(value, size=(8, 8)):
    return Image.new("RGB", size, (value, 255 - value, 7))


def boxes(page, value):
    """Left, top, width and height of the area in that picture's color."""
    pixels = np.asarray(page)
    rows, columns = np.where((pixels == (value, 255 - value, 7)).all(-1))
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    return columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1


@pytest.mark.parametrize("texts", [False, True])
def test_every_picture_has_its_row_and_column(texts):
    given = [[picture(60), picture(90)], [picture(120), picture(150)], [picture(180), picture(210)]]
    room = {}
    if texts:
        room["columns"] = ["left", "a title that takes more than a single line"]
        room["names"] = ["first\nremark", "second", "third"]
        room["captions"] = [["", "below"], ["", "long " * 50], ["one", ""]]
    page = sheet(given, tile=60, **room)
    found = [[boxes(page, value) for value in row] for row in ((60, 90), (120, 150), (180, 210))]
    assert all(box[2:] == (64, 64) for row in found for box in row)
    assert len({box[0] for row in found for box in row}) == 2
    assert len({box[1] for row in found for box in row}) == 3
    assert all(row[0][0] + 64 < row[1][0] for row in found)
    assert all(upper[0][1] + 64 < lower[0][1] for upper, lower in itertools.pairwise(found))


def test_large_pictures_keep_their_size():
    assert boxes(sheet([[picture(60, (300, 200))]]), 60)[2:] == (300, 200)


def test_parts_stand_below_each_other_between_title_and_footer():
    page = stacked([picture(60, (40, 30)), picture(90, (50, 20))], "a title", "a footer")
    (_, upper, *_), (_, lower, *_) = boxes(page, 60), boxes(page, 90)
    assert upper > 18 and lower == upper + 30 and page.height > lower + 20 + 18


@pytest.mark.parametrize(
    "text", ["a\x85b", "\0", "\x1b[31m", "\ud800", "\u202e\u2028", "x" * 20_000, "\ufffd" * 400]
)
def test_what_no_font_draws_is_left_out_and_long_names_are_cut(text):
    for room in ({"columns": [text]}, {"names": [text]}, {"captions": [[text]]}):
        page = sheet([[picture(60)]], tile=60, **room)
        assert boxes(page, 60)[2:] == (64, 64) and page.width < 8000
    assert boxes(stacked([picture(60)], text, text), 60)[2:] == (8, 8)
