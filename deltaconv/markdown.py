"""Reports as Markdown that reads well as plain text too."""

import re
from collections.abc import Iterable, Sequence

# What begins an emphasis, a link, code, a tag, an entity or a cell; a "_" inside a word does not.
_ACTS = re.compile(r"[\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w)")


def escaped(text: object) -> str:
    """A name from a file, a model or a prompt as one line on which nothing acts as markup."""
    return _ACTS.sub(lambda found: "\\" + found[0], " ".join(str(text).split()))


def bullets(lines: Iterable[str]) -> str:
    """A list, one item per line; without it Markdown runs lines together."""
    return "\n".join(f"- {line}" for line in lines)


def table(rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Rows of cells, the heading first → a table, padded so that its source lines up.

    The first `words` columns are aligned to the left, the others, numbers, to the right.
    """
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def padded(cell: str, at: int) -> str:
        return cell.ljust(widths[at]) if at < words else cell.rjust(widths[at])

    dashes = (
        "-" * width if at < words else "-" * (width - 1) + ":" for at, width in enumerate(widths)
    )
    first, *rest = ([padded(cell, at) for at, cell in enumerate(row)] for row in rows)
    return "\n".join([line(first), line(dashes), *map(line, rest)])
