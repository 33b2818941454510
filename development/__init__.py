"""What dev.py runs: set-up, a ComfyUI server, the demo, the gate. The pack never imports it."""

import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class DevelopmentError(Exception):
    """What went wrong and what to do, as sentences for the person at the terminal."""


def unwind_when_terminated() -> None:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt, so that `finally` stops every child."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
