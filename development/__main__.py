"""`python -I -m comfyui_deltaconv.development COMMAND …`: how dev.py enters its environment."""

import importlib
import sys

from . import DevelopmentError, unwind_when_terminated


def main(command: str, *arguments: str) -> int:
    unwind_when_terminated()
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
