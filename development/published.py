"""`python dev.py published`: fill in revision, path, size and SHA-256 of the packaged entries.

They are asked of the hub, where the file of an entry is the one .safetensors file whose name holds
the entry's name (sd15, sdxl, pixart); where there are several, --path chooses. What comes is what
users will get: look at the repository first, and at the difference before it is committed.
"""

import argparse
import json
from pathlib import Path

from ..deltaconv.hub.entries import PUBLISHED, published_entries, unfilled
from . import DevelopmentError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py published", description=__doc__)
    parser.add_argument(
        "--path",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="the file of an entry in its repository, such as sd15=file.safetensors",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    options = parser.parse_args(argv)
    fill(PUBLISHED, _chosen(options.path), options.revision)
    return 0


def fill(path: Path, chosen: dict[str, str], revision: str) -> None:
    """Write the hub's figures into the list at `path`; nothing is written where one is missing.

    `chosen` maps an entry's name → the path of its file. Raises DevelopmentError.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))
    if unknown := chosen.keys() - {row["name"] for row in rows}:
        raise DevelopmentError(
            f"Expected names of {path.name} before the = of --path, got {', '.join(unknown)}."
        )
    files = {repo: _files(repo, revision) for repo in {row["repo"] for row in rows}}
    for row in rows:
        commit, by_path = files[row["repo"]]
        row["revision"], row["path"] = commit, _path(row, by_path, chosen.get(row["name"]))
        row["size"], row["sha256"] = by_path[row["path"]]
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    filled = path.with_name(f".{path.name}.part")
    filled.write_text(text, encoding="utf-8")
    problems = [problem for entry in published_entries(filled) for problem in unfilled(entry)]
    if problems:
        filled.unlink()
        raise DevelopmentError(f"The hub's figures cannot be used: {'; '.join(problems)}.")
    filled.replace(path)
    for row in rows:
        print(f"{row['name']}: {row['path']}, {row['size']} bytes, {row['sha256']}")


def _chosen(lines: list[str]) -> dict[str, str]:
    if wrong := [line for line in lines if "=" not in line]:
        raise DevelopmentError(f"Expected --path NAME=PATH, got {wrong[0]!r}.")
    return dict(line.split("=", 1) for line in lines)


def _files(repo: str, revision: str) -> tuple[str | None, dict[str, tuple]]:
    """(commit, path → (size in bytes, SHA-256 or None)) of a repository's .safetensors files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        found = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (HTTPError, OSError) as error:
        raise DevelopmentError(
            f"Expected the hub to list {repo} at {revision}, got {type(error).__name__}. Check the "
            "names and the network."
        ) from None
    files = [file for file in found.siblings or [] if file.rfilename.endswith(".safetensors")]
    return found.sha, {f.rfilename: (f.size, f.lfs.sha256 if f.lfs else None) for f in files}


def _path(row: dict, by_path: dict[str, tuple], chosen: str | None) -> str:
    """The path of a row's file among those of its repository."""
    found = [path for path in by_path if row["name"] in path.casefold()]
    if chosen is not None:
        found = [path for path in by_path if path == chosen]
    if len(found) != 1:
        raise DevelopmentError(
            f"Expected one file of {row['repo']} for {row['name']}, got {len(found)} of "
            f"{', '.join(sorted(by_path)) or 'no .safetensors file'}. Choose it with --path "
            f"{row['name']}=PATH."
        )
    return found[0]
