"""`python dev.py release`: everything that must hold before a version is published."""

import argparse
import re
from pathlib import Path
from urllib.parse import urlparse

from ..deltaconv.hub.entries import published_entries, unfilled
from . import ROOT, DevelopmentError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

# Keys of [tool.comfy] and the files in docs/ that they show.
PICTURES = {"Icon": "icon.png", "Banner": "banner.png"}
_SEMVER = re.compile(r"\d+\.\d+\.\d+")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py release", description=__doc__)
    parser.parse_args(argv)
    if reasons := problems(ROOT):
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise DevelopmentError(f"This version is not ready to be published:\n{listed}")
    print("Ready to be published.")
    return 0


def problems(root: Path) -> list[str]:
    """Sentences that say what of the repository keeps it from being published."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = settings["project"], settings["tool"]["comfy"]
    found = []
    url = urlparse(project.get("urls", {}).get("Repository", ""))
    host = url.hostname or ""
    if url.scheme != "https" or "." not in host or host.split(".")[-1] == "invalid":
        found.append(
            f"expected the repository's public address in pyproject.toml, got {url.geturl()!r}; "
            "Icon and Banner begin with it too"
        )
    version = project["version"]
    if not _SEMVER.fullmatch(version):
        found.append(f"expected a version such as 1.2.3 in pyproject.toml, got {version!r}")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\]", changes, re.MULTILINE):
        found.append(f"expected a section ## [{version}] in CHANGELOG.md, got none")
    if not comfy.get("PublisherId"):
        found.append(
            "expected the PublisherId of your account at registry.comfy.org under [tool.comfy] in "
            "pyproject.toml, got none"
        )
    for key in ("DisplayName", "requires-comfyui"):
        if not comfy.get(key):
            found.append(f"expected {key} under [tool.comfy] in pyproject.toml, got none")
    for key, name in PICTURES.items():
        expected = f"{url.geturl()}/raw/main/docs/{name}"
        if comfy.get(key) != expected:
            got = comfy.get(key)
            found.append(f"expected {key} {expected} in pyproject.toml, got {got!r}")
    for name in ("LICENSE", "NOTICE", "README.md", *(f"docs/{name}" for name in PICTURES.values())):
        if not (root / name).is_file():
            found.append(f"expected a file {name}, got none")
    for entry in published_entries(root / "deltaconv" / "published.json"):
        found += [f"{problem}: run `python dev.py published`" for problem in unfilled(entry)]
    return found
