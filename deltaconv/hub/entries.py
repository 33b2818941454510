"""The files that may be downloaded, and the packaged list of them.

`published.json` names the authors' files. Its revisions, paths, sizes and hashes are filled in by
`dev.py published`; until then an entry says where its file is, to be fetched by hand.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..families import FAMILIES

PUBLISHED = Path(__file__).resolve().parent.parent / "published.json"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPO = re.compile(rf"{_NAME}/{_NAME}")
_REVISION = re.compile(rf"{_NAME}(/{_NAME})*")
# No part begins with a dot: neither a way up nor a hidden file.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+=()@ -]{0,150}"
_PATH = re.compile(rf"({_PART}/){{0,8}}{_PART}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Entry:
    """One file of a repository on the hub; `size` in bytes, `sha256` in lower-case hex.

    `family` is a name in `families.FAMILIES` for the packaged list, and "" for a user's own entry.
    """

    name: str
    label: str
    repo: str
    revision: str | None
    path: str | None
    size: int | None = None
    sha256: str | None = None
    family: str = ""

    @property
    def packaged(self) -> bool:
        """Whether it is of the packaged list."""
        return bool(self.family)

    @property
    def filled(self) -> bool:
        """Whether it says all that a download needs; a packaged one needs size and hash too."""
        needed = (self.revision, self.path)
        return None not in ((*needed, self.size, self.sha256) if self.packaged else needed)

    @property
    def file(self) -> str:
        """The name of the file in the folder: the last part of its path; "" if not known yet."""
        return (self.path or "").rpartition("/")[2]

    @property
    def page(self) -> str:
        """Where a person finds the repository's files."""
        return f"https://huggingface.co/{self.repo}/tree/{self.revision or 'main'}"

    @property
    def base_model(self) -> str:
        """The model that a packaged entry's blocks were made for, in words."""
        return FAMILIES[self.family].published_base if self.family else ""


def published_entries(path: Path = PUBLISHED) -> list[Entry]:
    """The packaged list."""
    entries = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        title = row.pop("title")
        entries.append(Entry(label=f"{title} ({row['repo']})", **row))
    return entries


def repo_problem(repo: str) -> str:
    """What is wrong with a repository's name; "" if nothing."""
    if _REPO.fullmatch(repo) and ".." not in repo and "--" not in repo:
        return ""
    return f"expected a repository such as owner/name, got {repo!r:.80}"


def revision_problem(revision: str) -> str:
    """What is wrong with a revision; "" if nothing."""
    if _REVISION.fullmatch(revision) and ".." not in revision:
        return ""
    return f"expected a branch, tag or commit, got {revision!r:.80}"


def path_problem(path: str) -> str:
    """What is wrong with the path of a file in a repository; "" if nothing."""
    if _PATH.fullmatch(path) and path.endswith(".safetensors"):
        return ""
    return (
        "expected the path of a .safetensors file in the repository, such as "
        f"folder/name.safetensors, got {path!r:.80}"
    )


def sha256_problem(sha256: str) -> str:
    """What is wrong with a hash; "" if nothing."""
    return "" if _SHA256.fullmatch(sha256) else f"expected 64 digits 0-9a-f, got {sha256!r:.80}"


def unfilled(entry: Entry) -> list[str]:
    """Sentences that say what keeps a packaged entry from being downloaded."""
    missing = [
        name for name in ("revision", "path", "size", "sha256") if getattr(entry, name) is None
    ]
    found = [f"expected {', '.join(missing)} of {entry.name}, got none"] if missing else []
    if entry.revision is not None and not _COMMIT.fullmatch(entry.revision):
        found.append(f"expected a commit as revision of {entry.name}, got {entry.revision!r}")
    for value, problem in (
        (entry.repo, repo_problem),
        (entry.path, path_problem),
        (entry.sha256, sha256_problem),
    ):
        if value is not None and (sentence := problem(value)):
            found.append(f"{entry.name}: {sentence}")
    return found
