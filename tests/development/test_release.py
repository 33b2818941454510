"""The release check refuses what must not be published, and the identity is the same everywhere."""

import shutil

import pytest
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.release import problems

FILES = ("pyproject.toml", "CHANGELOG.md", "LICENSE", "NOTICE", "README.md")


@pytest.fixture
def ready(tmp_path):
    """A copy of the repository's papers in which everything is ready."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    edit(tmp_path / "pyproject.toml", "deltaconv.invalid", "example.org")
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(changes.read_text(encoding="utf-8") + "\n## [0.1.0]\n", encoding="utf-8")
    return tmp_path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_ready_repository_passes(ready):
    assert problems(ready) == []


def test_the_repository_as_it_is_has_no_public_home():
    assert any("deltaconv.invalid" in reason for reason in problems(ROOT))


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("pyproject.toml", "https://example.org", "http://example.org", "public address"),
        ("pyproject.toml", 'version = "0.1.0"', 'version = "0.1"', "such as 1.2.3"),
        ("pyproject.toml", 'PublisherId = "deltaconv"', 'PublisherId = ""', "PublisherId"),
        ("CHANGELOG.md", "## [0.1.0]", "", r"section ## \[0.1.0\]".replace("\\", "")),
    ],
)
def test_what_is_missing_is_named(ready, name, old, new, words):
    edit(ready / name, old, new)
    assert any(words in reason for reason in problems(ready))


def test_a_missing_licence_is_named(ready):
    (ready / "LICENSE").unlink()
    assert problems(ready) == ["expected a file LICENSE, got none"]


def test_the_repository_address_stands_in_one_place():
    holders = [
        path.name
        for path in ROOT.iterdir()
        if path.is_file() and "deltaconv.invalid" in path.read_text(encoding="utf-8")
    ]
    assert holders == ["pyproject.toml"]
