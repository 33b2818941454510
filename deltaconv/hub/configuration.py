"""`repositories.json`: the files beside the packaged list that a user allows to be downloaded.

A list of objects: `repo`, `revision`, `path`, and optionally `sha256` and `size` in bytes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .entries import Entry, path_problem, repo_problem, revision_problem, sha256_problem

# Bytes; far above a list that a person writes.
_LARGEST = 1 << 20


def _checked(problem):
    def check(value: str) -> str:
        if sentence := problem(value):
            raise ValueError(sentence)
        return value

    return AfterValidator(check)


class Repository(BaseModel):
    """One file of a repository, as the user names it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    repo: Annotated[str, _checked(repo_problem)]
    revision: Annotated[str, _checked(revision_problem)]
    path: Annotated[str, _checked(path_problem)]
    sha256: Annotated[str, _checked(sha256_problem)] | None = None
    size: Annotated[int, Field(gt=0)] | None = None


def read_configuration(path: Path, taken: Iterable[str] = ()) -> list[Entry]:
    """The entries of a `repositories.json`; `taken` are names of files that others have.

    Raises ValueError that lists everything that is wrong.
    """
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise _unusable(path, [f"expected at most {_LARGEST} bytes, got {size}"])
        rows = TypeAdapter(list[Repository]).validate_json(path.read_bytes())
    except OSError as error:
        raise _unusable(path, [error.strerror or type(error).__name__]) from error
    except ValidationError as error:
        raise _unusable(path, map(_phrase, error.errors())) from None
    # Names of files are one on some systems where they differ in case alone.
    names = {name.casefold() for name in taken if name}
    entries, problems = [], []
    for number, row in enumerate(rows, 1):
        entry = Entry(
            name=row.path.rpartition("/")[2].removesuffix(".safetensors"),
            label=f"{row.path} ({row.repo})",
            **row.model_dump(),
        )
        if entry.file.casefold() in names:
            problems.append(f"entry {number}: another file is stored as {entry.file} already")
        names.add(entry.file.casefold())
        entries.append(entry)
    if problems:
        raise _unusable(path, problems)
    return entries


def _unusable(path: Path, problems: Iterable[str]) -> ValueError:
    return ValueError(
        f"{path} cannot be used: {'; '.join(problems)}. Correct it; the help page of Download "
        "ΔConv Weights shows an example."
    )


def _phrase(error) -> str:
    number, *field = error["loc"] or ("",)
    where = f"entry {number + 1}" if isinstance(number, int) else "the list"
    if field:
        where += f", {field[0]}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"
