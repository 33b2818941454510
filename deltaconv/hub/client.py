"""What is asked of the hub, through the session, addresses and token of huggingface_hub.

The bytes are read here rather than by `hf_hub_download`: that one follows any redirect, checks the
size alone, and begins anew after an interruption. Files in Xet storage come by their plain
address, which the hub gives for every file.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from .entries import Entry, sha256_problem
from .failures import DownloadError, host_of, refused, too_many, unreachable, wrong_host

# Hugging Face's own; large files come from cdn-lfs*.huggingface.co and *.xethub.hf.co.
_HOSTS = ("huggingface.co", "hf.co")
_NETLOC = re.compile(r"[A-Za-z0-9.-]+(:443)?")
_MOST_REDIRECTS = 5
_REDIRECTS = {301, 302, 303, 307, 308}
# In seconds, over all tries of one request; a longer Retry-After is said, not waited for.
LONGEST_WAIT = 60.0
_TRIES = 4
_CHUNK = 1 << 16

# Is called while something is waited for, and may raise to interrupt.
Tick = Callable[[], None]


T = TypeVar("T")


class Broken(Exception):
    """The connection ended before the file did."""


class Offline(Exception):
    """huggingface_hub is set to ask nothing of the network."""


class _TooMany(Exception):
    def __init__(self, host: str, seconds: float | None):
        self.host, self.seconds = host, seconds


@dataclass(frozen=True)
class Remote:
    """What the hub says of a file: its size in bytes, and its SHA-256 where it keeps one."""

    size: int | None
    sha256: str | None


def ask(entry: Entry, tick: Tick) -> Remote:
    """Size and hash of an entry's file; raises DownloadError, or Offline."""
    return _patiently(lambda: _ask(entry), tick)


@contextmanager
def reading(entry: Entry, start: int, tick: Tick) -> Iterator[tuple[int, Iterator[bytes]]]:
    """(first byte, chunks) of an entry's file, from byte `start` on or from 0 where it must be.

    Raises DownloadError for a refusal, Offline, and Broken for a connection that ends, on opening
    and by the chunks.
    """
    with ExitStack() as stack:
        begin, response = _patiently(lambda: _open(entry, start, stack), tick)
        raw = hasattr(response, "iter_raw")
        yield begin, _unbroken(response.iter_raw() if raw else response.iter_content(_CHUNK))


def pause(seconds: float, tick: Tick) -> None:
    """Sleep, and call `tick` a few times a second."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        tick()
        time.sleep(min(left, 0.2))


def is_trusted(url: str, endpoint: str) -> bool:
    """Whether `url` is at the endpoint itself, or at a host of Hugging Face over https."""
    target, home = urlsplit(url), urlsplit(endpoint)
    if _origin(target) == _origin(home):
        return True
    if target.scheme != "https" or not _NETLOC.fullmatch(target.netloc):
        return False
    host = (target.hostname or "").lower()
    return any(host == known or host.endswith(f".{known}") for known in _HOSTS)


def _origin(parts) -> tuple[str, str]:
    return parts.scheme, parts.netloc.lower()


def _address(entry: Entry) -> tuple[str, str]:
    """(endpoint, address of the file there)."""
    from huggingface_hub import constants, hf_hub_url

    return constants.ENDPOINT, hf_hub_url(
        entry.repo, entry.path or "", revision=entry.revision, endpoint=constants.ENDPOINT
    )


def _ask(entry: Entry) -> Remote:
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    endpoint, url = _address(entry)
    host = host_of(endpoint)
    try:
        with _no_connection(unreachable(host)):
            found = get_hf_file_metadata(url)
    except HfHubHTTPError as error:
        raise _no_success(entry, host, error.response) from None
    if not is_trusted(found.location, endpoint):
        raise wrong_host(entry, host_of(found.location))
    sha256 = found.etag if found.etag and not sha256_problem(found.etag) else None
    return Remote(found.size, sha256)


def _open(entry: Entry, start: int, stack: ExitStack) -> tuple[int, Any]:
    """(first byte, response) of the file, with redirects followed to trusted hosts alone."""
    from huggingface_hub.utils import build_hf_headers

    endpoint, url = _address(entry)
    home = urlsplit(url)
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    for _ in range(_MOST_REDIRECTS + 1):
        # The token is for the endpoint; a signed address elsewhere needs none.
        at_home = _origin(urlsplit(url)) == _origin(home)
        sent = {**(build_hf_headers() if at_home else {}), **headers}
        with _no_connection(Broken()):
            response = stack.enter_context(_request(url, sent))
        status = response.status_code
        if status in _REDIRECTS and "location" in response.headers:
            url = urljoin(url, response.headers["location"])
            if not is_trusted(url, endpoint):
                raise wrong_host(entry, host_of(url))
        elif status == 416 and "Range" in headers:
            del headers["Range"]
        elif status == 206 and not _begins_at(start, response):
            raise Broken
        elif status in (200, 206):
            return (start if status == 206 else 0), response
        else:
            raise _no_success(entry, host_of(url), response)
    raise DownloadError(
        f"Expected {entry.path} of {entry.repo}, got more than {_MOST_REDIRECTS} redirects. Check "
        "the environment variable HF_ENDPOINT, and try again later."
    )


def _request(url: str, headers: dict[str, str]) -> AbstractContextManager[Any]:
    """A GET whose body is read as it comes, and whose redirects are not followed."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(getattr(session, "stream", None)):
        return session.stream("GET", url, headers=headers, follow_redirects=False, timeout=seconds)
    # Before its version 1 huggingface_hub had a session of requests.
    return session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=seconds)


def _begins_at(start: int, response) -> bool:
    return response.headers.get("content-range", "").startswith(f"bytes {start}-")


@contextmanager
def _no_connection(broken: Exception) -> Iterator[None]:
    """Raise Offline, or `broken`, for what the session raises where there is no answer."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError:
        raise
    except OfflineModeIsEnabled:
        raise Offline from None
    # The errors of httpx are HTTPErrors, those of requests OSErrors.
    except (HTTPError, OSError):
        raise broken from None


def _unbroken(chunks: Iterator[bytes]) -> Iterator[bytes]:
    while True:
        with _no_connection(Broken()):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def _no_success(entry: Entry, host: str, response) -> Exception:
    if response.status_code != 429:
        return refused(entry, host, response.status_code)
    return _TooMany(host, _seconds(response.headers.get("retry-after", "")))


def _seconds(text: str) -> float | None:
    """The wait that a Retry-After asks for, as a number of seconds or as a date."""
    text = text.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max((date - datetime.now(timezone.utc)).total_seconds(), 0.0)


def _patiently(call: Callable[[], T], tick: Tick) -> T:
    """`call()`, again after the wait that the hub asks for while that is short."""
    waited = 0.0
    for attempt in count(1):
        tick()
        try:
            return call()
        except _TooMany as error:
            host, seconds = error.host, error.seconds
        if attempt == _TRIES or seconds is None or waited + seconds > LONGEST_WAIT:
            break
        waited += seconds
        pause(seconds, tick)
    raise too_many(host, seconds)
