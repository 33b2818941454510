"""`python -I -m comfyui_deltaconv.development COMMAND …`: how dev.py enters its environment."""

import importlib
import signal
import sys

from . import DevelopmentError


def main(command: str, *arguments: str) -> int:
    # SIGTERM unwinds like Ctrl-C, so every server and child is stopped by its own `finally`.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    module = importlib.import_module(f".{command}", __package__)
    try:
        return module.main(list(arguments))
    except DevelopmentError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    sys.exit(main(*sys.argv[1:]))
