"""All entries that there are for a folder: the packaged ones, and those of its own file."""

from pathlib import Path

from .entries import Entry, published_entries

CONFIGURATION = "repositories.json"


def known_entries(folder: Path) -> list[Entry]:
    """The packaged list and the entries of the folder's `repositories.json`, if there is one.

    Raises ValueError that lists what is wrong in that file.
    """
    entries = published_entries()
    path = folder / CONFIGURATION
    if path.is_file():
        # Import here: pydantic takes longer than all of the pack, and few have such a file.
        from .configuration import read_configuration

        entries += read_configuration(path, taken=[entry.file for entry in entries])
    return entries


def find_entry(name: str, folder: Path) -> Entry:
    """The known entry with this name or label.

    Raises ValueError that lists the names, or says what is wrong in `repositories.json`.
    """
    for entry in (packaged := published_entries()):
        if name in (entry.name, entry.label):
            return entry
    known = known_entries(folder)
    for entry in known[len(packaged) :]:
        if name in (entry.name, entry.label):
            return entry
    raise ValueError(
        f"Expected one of {', '.join(entry.name for entry in known)}, got {name!r:.120}. Files of "
        f"other repositories are named in {folder / CONFIGURATION}."
    )
