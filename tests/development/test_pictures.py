"""Every help page has a picture of its node, small enough for the info panel and the archive."""

from comfyui_deltaconv.development.pictures import COLORS, EXAMPLES, FOLDER, WIDTH

PAGES = {path.stem: path for path in FOLDER.parent.glob("*.md")}


def test_there_is_an_example_of_every_node():
    assert EXAMPLES.keys() == PAGES.keys()


def test_every_page_shows_its_picture_and_says_how_to_connect_the_node():
    for name, page in PAGES.items():
        lines = page.read_text(encoding="utf-8").splitlines()
        (line,) = (number for number, each in enumerate(lines) if f"(images/{name}.png)" in each)
        assert lines[line].startswith("![") and not lines[line].startswith("![]"), name
        assert lines[line + 2].startswith("*Smallest example:* "), name


def test_pictures_are_small():
    from PIL import Image

    for name in PAGES:
        with Image.open(FOLDER / f"{name}.png") as picture:
            assert picture.mode == "P" and len(picture.getcolors()) <= COLORS
            assert WIDTH <= picture.width < WIDTH + 20
    assert sum((FOLDER / f"{name}.png").stat().st_size for name in PAGES) < 250_000
