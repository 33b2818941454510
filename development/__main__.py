"""`python -I -m comfyui_deltaconv.development COMMAND …`: how dev.py enters its environment."""

import importlib
import sys

from ..cli import CommandError
from ..cli.__main__ import main as product
from . import DevelopmentError, unwind_when_terminated

# What users run as well.
PRODUCT = {"bench", "selftest"}


def main(command: str, *arguments: str) -> int:
    unwind_when_terminated()
    if command in PRODUCT:
        return product([command, *arguments], program="dev.py")
    module = importlib.import_module(f".{command}", __package__)
    try:
        return module.main(list(arguments))
    except (DevelopmentError, CommandError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    sys.exit(main(*sys.argv[1:]))
