"""A server on 127.0.0.1 that answers for files as the Hugging Face hub does, and misbehaves."""

import hashlib
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_CHUNK = 1 << 15


class Hub:
    """Files by `owner/name`, then path; and what to do wrong."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        # Answers that come before any other: (status, headers).
        self.first: list[tuple[int, dict]] = []
        # After how many bytes the next bodies end; then they are whole.
        self.cut: list[int] = []
        # Seconds before each chunk of a body.
        self.slow = 0.0
        # What a GET sends instead of the file.
        self.instead: bytes | None = None
        # The server that a file is redirected to, as from Xet or LFS storage; "" for none.
        self.storage = ""
        # Whether the redirect is seen by a GET alone.
        self.late = False
        self.ranges = True
        # As kept in LFS or Xet storage: the tag is the SHA-256; else it is git's.
        self.large = True
        # (method, path, headers) of every request.
        self.seen: list[tuple[str, str, dict]] = []

    def gets(self) -> list[dict]:
        """The headers of all GETs."""
        return [headers for method, _, headers in self.seen if method == "GET"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _pointer(data: bytes) -> dict:
    return {"sha256": sha256(data), "size": len(data), "pointerSize": 134}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def send(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(body))))
        self.end_headers()
        return body if self.command == "GET" else b""

    def answer(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        # huggingface_hub asks once per process, to say in its name what it runs in.
        if path == "/api/agent-harnesses":
            self.wfile.write(self.send(404, {}))
            return
        hub.seen.append((self.command, path, dict(self.headers)))
        if hub.first:
            self.wfile.write(self.send(*hub.first.pop(0), b"no"))
            return
        if path.startswith("/api/models/"):
            self.repository(path.removeprefix("/api/models/").partition("/revision/")[0])
            return
        repo, _, rest = path.strip("/").partition("/resolve/")
        found = hub.files.get(repo, {}).get(rest.partition("/")[2])
        if found is None:
            self.wfile.write(self.send(404, {"X-Error-Code": "EntryNotFound"}, b"no"))
            return
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        git = hashlib.sha1(b"blob %d\0" % len(found) + found).hexdigest()
        headers["ETag"] = f'"{sha256(found) if hub.large else git}"'
        if hub.storage and not (hub.late and self.command == "HEAD"):
            headers |= {
                "X-Linked-Size": str(len(found)),
                "X-Linked-Etag": headers["ETag"],
                "X-Xet-Hash": "0" * 64,
                "Location": f"{hub.storage}{self.path}?signature=secret",
            }
            self.wfile.write(self.send(302, headers))
            return
        self.body(hub, found, headers)

    def body(self, hub, found, headers):
        if self.command == "HEAD":
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(found))}.items():
                self.send_header(name, value)
            self.end_headers()
            return
        data = found if hub.instead is None else hub.instead
        start, status = 0, 200
        if hub.ranges and (asked := self.headers.get("Range")):
            start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(status, headers | {"Content-Length": str(len(data) - start)})
        rest = data[start:]
        if hub.cut:
            rest = rest[: hub.cut.pop(0)]
            self.close_connection = True
        for place in range(0, len(rest), _CHUNK):
            time.sleep(hub.slow)
            try:
                self.wfile.write(rest[place : place + _CHUNK])
            except OSError:
                return

    def repository(self, repo):
        if repo not in self.hub.files:
            self.wfile.write(self.send(404, {"X-Error-Code": "RepoNotFound"}, b"no"))
            return
        files = [
            {"rfilename": path, "size": len(data)}
            | ({"lfs": _pointer(data)} if self.hub.large else {})
            for path, data in self.hub.files[repo].items()
        ]
        text = json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode()
        self.wfile.write(self.send(200, {"Content-Type": "application/json"}, text))


@contextmanager
def serving():
    """(hub, its address) while it serves."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def hub_of_this_process(monkeypatch, tmp_path):
    """A hub that huggingface_hub in this process asks, without the user's own token.

    Its constants are set, because it read the environment when it was imported.
    """
    from huggingface_hub import constants

    with serving() as (hub, address):
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
