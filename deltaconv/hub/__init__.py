"""ΔConv files on Hugging Face: which are known, and how one gets into a folder."""

from .entries import Entry, published_entries
from .failures import DownloadError, not_known
from .fetch import Found, download
from .known import CONFIGURATION, find_entry, known_entries
from .placed import find_placed, placed_path

__all__ = [
    "CONFIGURATION",
    "DownloadError",
    "Entry",
    "Found",
    "download",
    "find_entry",
    "find_placed",
    "known_entries",
    "not_known",
    "placed_path",
    "published_entries",
]
