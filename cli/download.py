"""List the ΔConv files that are known on Hugging Face, or fetch one of them.

Known are the authors' files and those that repositories.json in the folder allows. A file is
checked while it comes, and gets its name when it is whole and a ΔConv file; after Ctrl-C the same
command goes on where it was. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to
huggingface_hub.
"""

import argparse
import sys
import time
from pathlib import Path

from . import CommandError
from .host import find_comfyui

# In seconds, between two lines of progress.
_BETWEEN = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="which file, as the list names it; default: list")
    parser.add_argument(
        "--folder", type=Path, help="where files go (default: models/deltaconv of ComfyUI)"
    )
    parser.add_argument("--comfyui", type=Path, help="default: the ComfyUI the pack lies in")


def run(options: argparse.Namespace) -> int:
    from ..deltaconv import hub

    folder = options.folder or find_comfyui(options.comfyui) / "models" / "deltaconv"
    folder = folder.expanduser().resolve()
    try:
        if options.name is None:
            for entry in hub.known_entries(folder):
                print(_line(entry))
            return 0
        entry = hub.find_entry(options.name, folder)
        print(hub.download(entry, folder, _Progress()).note())
    except ValueError as error:
        raise CommandError(str(error)) from None
    return 0


def _line(entry) -> str:
    size = f", {entry.size / 1e6:.1f} MB" if entry.size else ""
    state = "" if entry.filled else f", to be fetched by hand from {entry.page}"
    return f"{entry.name:<12}{entry.label}{size}{state}"


class _Progress:
    """Prints bytes, at most once a second."""

    def __init__(self):
        self.next = time.monotonic() + _BETWEEN

    def __call__(self, done: int, total: int) -> None:
        if total and (now := time.monotonic()) >= self.next:
            self.next = now + _BETWEEN
            print(f"{done / 1e6:.1f} of {total / 1e6:.1f} MB", file=sys.stderr, flush=True)
