"""What can go wrong on the way, as sentences: what was expected, what was got, what to do.

No sentence holds what a server says, an address with its query, or a header that was sent: tokens
and signed addresses stay out of them.
"""

import errno
from pathlib import Path
from urllib.parse import urlsplit

from .entries import Entry

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


class DownloadError(ValueError):
    """A file cannot be had from Hugging Face; the message says what to do."""


def megabytes(count: int) -> str:
    """`count` bytes, for a sentence."""
    return f"{count / 1e6:.1f} MB"


def host_of(url: str) -> str:
    """The host of an address, without what else it may hold."""
    return urlsplit(url).hostname or "an unnamed host"


def not_known(entry: Entry, folder: Path) -> DownloadError:
    """The error for a packaged entry that is not filled in, and whose file is not in `folder`."""
    return DownloadError(
        f"Expected the address of the file for {entry.label}, got none: this version of the pack "
        f"does not know it yet. Download the file from {entry.page} and put it into {folder}: the "
        f"blocks for {entry.base_model} are recognized there under any name."
    )


def refused(entry: Entry, host: str, status: int) -> DownloadError:
    """The error for an answer of `host` with this status, which is no success."""
    if status in (401, 403):
        return DownloadError(
            f"Expected {host} to give {entry.path} of {entry.repo}, got status {status}: the "
            "repository is private, asks to accept its terms, or does not exist. Look at its page "
            "in a browser; if it opens there, set the environment variable HF_TOKEN to a token of "
            "your account that may read it."
        )
    if status == 404:
        return DownloadError(
            f"Expected {entry.path} at revision {entry.revision} of {entry.repo} on {host}, got "
            "status 404: there is no such file, revision or repository. Correct the entry in "
            "repositories.json, or update this pack where the entry is its own."
        )
    return DownloadError(
        f"Expected {host} to give {entry.path} of {entry.repo}, got status {status}. Try again "
        "later."
    )


def too_many(host: str, seconds: float | None) -> DownloadError:
    """The error for status 429, with what Retry-After asks for."""
    when = "later" if seconds is None else f"in {seconds:.0f} s, as it asks for"
    return DownloadError(
        f"Expected {host} to answer, got status 429: too many requests from here. Try again {when}."
    )


def unreachable(host: str) -> DownloadError:
    return DownloadError(
        f"Expected an answer of {host}, got no connection. Check the network, the proxy and the "
        "environment variable HF_ENDPOINT, and try again."
    )


def offline(entry: Entry, folder: Path) -> DownloadError:
    return DownloadError(
        f"Expected to download {entry.path} of {entry.repo}, got the environment variable "
        f"HF_HUB_OFFLINE, which forbids it: unset it, or put the file into {folder} by hand."
    )


def wrong_host(entry: Entry, host: str) -> DownloadError:
    return DownloadError(
        f"Expected {entry.path} of {entry.repo} from the hub or a host of Hugging Face, got a "
        f"redirect to {host}, which is not followed. Check the environment variable HF_ENDPOINT."
    )


def cannot_write(error: OSError, folder: Path) -> DownloadError:
    """The error for what the system says when a file of `folder` is read or written."""
    if error.errno in _DISK_FULL:
        return DownloadError(
            f"Expected room for the file in {folder}, got a full disk. Make room and run this "
            "again: it goes on where it stopped."
        )
    if error.errno in _READ_ONLY:
        return DownloadError(
            f"Expected a folder that may be written to, got {folder}, which may not "
            f"({error.strerror}). Allow it, or put the file there by hand."
        )
    return DownloadError(
        f"Expected to write into {folder}, got: {error.strerror or type(error).__name__}. Check "
        "the folder and its disk."
    )
