"""What dev.py runs: set-up, a ComfyUI server, the demo, the gate. The pack never imports it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class DevelopmentError(Exception):
    """What went wrong and what to do, as sentences for the person at the terminal."""
