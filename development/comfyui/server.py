"""A real ComfyUI server as a child process, with this pack loaded in a folder of its own."""

import contextlib
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import ROOT, DevelopmentError
from .client import Client
from .tree import front_end_folder, front_end_pin, version_of

# On a CPU ComfyUI does not choose the fastest attention it has; this argument does.
FASTEST_ATTENTION = "--use-pytorch-cross-attention"
PACK = "deltaconv"
FOLDERS = ("custom_nodes", "models", "input", "output", "user", "temp")
BOOT_SECONDS = 180


class Server(Client):
    """A running server: what `Client` offers, its base folder, its log."""

    def __init__(self, port: int, base: Path, log: Path, process: subprocess.Popen):
        super().__init__(f"127.0.0.1:{port}")
        self.base, self.log, self.process = base, log, process

    def check_alive(self) -> None:
        """Raise DevelopmentError with the end of the log if the process has ended."""
        if self.process.poll() is not None:
            raise DevelopmentError(
                f"ComfyUI ended by itself with exit code {self.process.returncode}. {self.tail()}"
            )

    def said(self) -> str:
        """Everything the server has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def tail(self, lines: int = 25) -> str:
        end = "\n".join("    " + line for line in self.said().splitlines()[-lines:])
        return f"The end of its log:\n{end}"


@contextlib.contextmanager
def running(
    tree: Path,
    *,
    base: Path | None = None,
    port: int | None = None,
    cpu: bool = True,
    python: Path = Path(sys.executable),
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """Start the ComfyUI in `tree`, yield it once it answers and has our nodes, then stop it.

    `base` holds its models, input and output, a temporary folder without it; `port` is a free one
    without it; `python` runs it. Raises DevelopmentError if the port is taken, or the server dies,
    stays silent, or fails to load the pack.
    """
    with contextlib.ExitStack() as stack:
        if base is None:
            base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltaconv-")))
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True, exist_ok=True)
        _link(ROOT, base / "custom_nodes" / PACK)
        port = _free_port(port)
        log = base / "server.log"
        line = [str(python), "-s", "main.py", *_arguments(tree, base, port, cpu), *arguments]
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                line,
                cwd=tree,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **_own_group(),
            )
        try:
            server = Server(port, base, log, process)
            _wait_until_up(server, tree)
            _check_pack(server)
            yield server
        finally:
            _stop(process)


def has_accelerator() -> bool:
    """Whether torch sees a GPU or the like on this machine."""
    import torch

    return torch.accelerator.is_available()


def _arguments(tree: Path, base: Path, port: int, cpu: bool) -> list[str]:
    line = ["--base-directory", str(base), "--port", str(port), "--disable-auto-launch"]
    line += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK]
    line += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    if cpu:
        line.append("--cpu")
    # Each ComfyUI is shown with the web page it pins.
    pin = front_end_pin(tree)
    folder = front_end_folder(pin) / "comfyui_frontend_package" / "static" if pin else None
    if pin and pin != importlib.metadata.version("comfyui-frontend-package") and folder.is_dir():
        line += ["--front-end-root", str(folder)]
    return line


def _environment() -> dict[str, str]:
    """Ours, without what would change the server's import path, and with readable output."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def _own_group() -> dict[str, object]:
    """Popen options that keep the terminal's Ctrl-C from the server: we stop it ourselves."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _free_port(wanted: int | None) -> int:
    with socket.socket() as probe:
        # As the server itself does; else a port that was closed a moment ago counts as taken.
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise DevelopmentError(
                f"Port {wanted} is taken ({error.strerror}). Stop what uses it (another ComfyUI?) "
                "or choose another with --port."
            ) from error
        return probe.getsockname()[1]


def _link(source: Path, link: Path) -> None:
    """Show the repository at `link`; a pack that really lies there stays."""
    if os.name == "nt":
        import _winapi

        # Junctions need no rights, unlike Windows' symbolic links.
        if not link.exists():
            _winapi.CreateJunction(str(source), str(link))
        return
    if link.is_symlink():
        # Perhaps of a clone that was moved or is another.
        link.unlink()
    if not link.exists():
        link.symlink_to(source, target_is_directory=True)


def _wait_until_up(server: Server, tree: Path) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise DevelopmentError(
                f"ComfyUI {version_of(tree)} ended while it started, with exit code "
                f"{server.process.returncode}. {server.tail()}"
            )
        if server.answers():
            return
        time.sleep(0.1)
    raise DevelopmentError(
        f"ComfyUI {version_of(tree)} did not answer within {BOOT_SECONDS} s. {server.tail()}"
    )


def _check_pack(server: Server) -> None:
    """ComfyUI turns an exception of a pack into a line of its log; here it is an error."""
    said = server.said()
    failed = re.search(rf"IMPORT FAILED\): .*[/\\]{PACK}\s*$", said, re.MULTILINE)
    if failed or "DeltaConvApply" not in server.object_info():
        raise DevelopmentError(f"ComfyUI could not load this pack. {server.tail(60)}")


def _stop(process: subprocess.Popen) -> None:
    """End the server and whatever it started; returns when it is gone."""
    if os.name == "nt":
        line = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(line, capture_output=True)
        process.wait()
        return
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
