"""The release check refuses what must not be published, and the identity is the same everywhere."""

import json
import shutil

import pytest
from comfyui_deltaconv.deltaconv.hub.entries import PUBLISHED
from comfyui_deltaconv.development import ROOT, DevelopmentError
from comfyui_deltaconv.development.release import main, problems, tomllib

FILES = ("pyproject.toml", "CHANGELOG.md", "LICENSE", "NOTICE", "README.md")
PICTURES = ("docs/icon.png", "docs/banner.png")


@pytest.fixture
def ready(tmp_path):
    """A copy of the repository's papers in which everything is ready."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "docs").mkdir()
    for name in PICTURES:
        shutil.copy(ROOT / name, tmp_path / name)
    edit(tmp_path / "pyproject.toml", address(), "https://example.org/repository")
    edit(tmp_path / "pyproject.toml", f'PublisherId = "{publisher()}"', 'PublisherId = "somebody"')
    (tmp_path / "deltaconv").mkdir()
    write_published(tmp_path, filled(json.loads(PUBLISHED.read_text(encoding="utf-8"))))
    return tmp_path


def filled(rows):
    """The packaged entries with figures; that they are of no file does not matter here."""
    figures = {"revision": "0" * 40, "path": "x.safetensors", "size": 1, "sha256": "0" * 64}
    return [{**row, **figures} for row in rows]


def write_published(root, rows):
    (root / "deltaconv" / "published.json").write_text(json.dumps(rows), encoding="utf-8")


def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def address():
    """The repository's, as pyproject.toml has it."""
    return settings()["project"]["urls"]["Repository"]


def publisher():
    return settings()["tool"]["comfy"]["PublisherId"]


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_ready_repository_passes(ready):
    assert problems(ready) == []


def test_nothing_is_left_but_what_a_person_alone_can_do():
    """The public address, the account at the registry, the files on the hub."""
    theirs = ("public address", "PublisherId of your account", "run `python dev.py published`")
    other = [reason for reason in problems(ROOT) if not any(words in reason for words in theirs)]
    assert other == []


def test_icon_and_banner_are_as_the_registry_takes_them():
    from PIL import Image

    sizes = {}
    for name in PICTURES:
        with Image.open(ROOT / name) as picture:
            sizes[name] = picture.size
    width, height = sizes["docs/icon.png"]
    assert width == height <= 400
    width, height = sizes["docs/banner.png"]
    assert width * 9 == height * 21


def test_the_version_stands_in_one_place():
    version = settings()["project"]["version"]
    assignments = [
        path.relative_to(ROOT).as_posix()
        for folder in ("cli", "deltaconv", "kernels", "nodes", "development")
        for path in (ROOT / folder).rglob("*.py")
        if f'"{version}"' in path.read_text(encoding="utf-8")
    ]
    assert assignments == []


def test_the_command_says_what_still_keeps_the_repository_from_being_published(capsys):
    if reasons := problems(ROOT):
        with pytest.raises(DevelopmentError) as refused:
            main([])
        assert all(f"  - {reason}" in str(refused.value) for reason in reasons)
    else:
        assert main([]) == 0
        assert "Ready to be published." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("pyproject.toml", "https://example.org", "http://example.org", "public address"),
        ("pyproject.toml", 'version = "0.1.0"', 'version = "0.1"', "such as 1.2.3"),
        ("pyproject.toml", 'PublisherId = "somebody"', 'PublisherId = ""', "registry.comfy.org"),
        ("pyproject.toml", "docs/icon.png", "docs/other.png", "expected Icon https://"),
        ("CHANGELOG.md", "## [0.1.0]", "", r"section ## \[0.1.0\]".replace("\\", "")),
    ],
)
def test_what_is_missing_is_named(ready, name, old, new, words):
    edit(ready / name, old, new)
    assert any(words in reason for reason in problems(ready))


def test_a_missing_licence_is_named(ready):
    (ready / "LICENSE").unlink()
    assert problems(ready) == ["expected a file LICENSE, got none"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"revision": None, "sha256": None}, "expected revision, sha256 of sdxl, got none: run"),
        ({"revision": "main"}, "expected a commit as revision of sdxl, got 'main'"),
        ({"path": "../x.safetensors"}, "sdxl: expected the path of a .safetensors file"),
        ({"sha256": "0"}, "sdxl: expected 64 digits"),
    ],
)
def test_an_entry_of_a_file_to_download_that_is_not_filled_in_is_named(ready, changed, words):
    rows = filled(json.loads(PUBLISHED.read_text(encoding="utf-8")))
    rows[1] |= changed
    write_published(ready, rows)
    (problem,) = problems(ready)
    assert problem.startswith(words) and "dev.py published" in problem


def test_the_repository_address_stands_in_one_place():
    holders = [
        path.name
        for path in ROOT.iterdir()
        if path.is_file() and address() in path.read_text(encoding="utf-8")
    ]
    assert holders == ["pyproject.toml"]
