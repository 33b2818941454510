"""Set up, try, test and develop the pack: `python dev.py COMMAND`; without a command it lists them.

This file and what it imports use the standard library only. It keeps the environment in `.venv`
beside it, then runs `development/<command>.py` inside.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (an older Python gets a sentence, not a SyntaxError)
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"dev.py needs Python 3.10 or newer, got {found}. Run it with a newer one.")

import importlib
import os
import subprocess
import time

from development import DevelopmentError, unwind_when_terminated
from development.comfyui.tree import OLDEST
from development.environment import ensure

# To add a command: write development/<command>.py with `main(argv: list[str]) -> int`, add a line.
# bench and selftest are the product's (cli/); distill adds to it.
COMMANDS = {
    "architecture": "draw the map of docs/architecture.md from the imports",
    "artwork": "draw the pack's icon and banner",
    "bench": "time attention, its replacements and the ΔConvBlock on this machine",
    "demo": "draw the demo pictures with and without ΔConv, and say how long each took",
    "distill": "distill the demo, or any checkpoint, into ΔConv weights",
    "families": "write the tables of families from what their tests came to",
    "eval": "run the demo teacher, stock or with a ΔConv file, on tensors from a file",
    "limits": "find what the demo's blocks would gain from what they cannot know",
    "lint": "check style, formatting, import contracts and types",
    "lock": "write the versions that set-up installs anew; --upgrade takes the newest",
    "locales": "write the English texts of all nodes, for translations",
    "locality": "measure where the demo teacher's attention looks, on tensors from a file",
    "measures": "find which figure ranks students of the demo as their pictures do",
    "pictures": "take the pictures of the help pages in a real page",
    "published": "fill in revision, size and hash of the authors' files from Hugging Face",
    "release": "say what still keeps this version from being published",
    "scale": "say what distilling each family on many devices needs; --measure times it here",
    "selftest": "compare the kernels with their definition on this machine's device",
    "serve": "start ComfyUI with the pack loaded, for your browser",
    "test": "run the tests; --all adds the long tier, the rest goes to pytest",
}
ALIASES = {"distil": "distill"}
# The oldest supported ComfyUI is fetched for these alone; the newest one, or yours, for all.
NEEDS_OLDEST = {"test"}
# What makes the environment must not need it.
WITHOUT_ENVIRONMENT = {"lock"}


def usage() -> str:
    lines = [f"  {name:<14}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(["usage: python dev.py COMMAND [arguments]", "", *lines])


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, *arguments = argv
    command = ALIASES.get(command, command)
    if command not in COMMANDS:
        print(f"Unknown command {command!r}.\n{usage()}", file=sys.stderr)
        return 2
    unwind_when_terminated()
    start = time.monotonic()
    try:
        if command in WITHOUT_ENVIRONMENT:
            return importlib.import_module(f"development.{command}").main(arguments)
        python = ensure([OLDEST] if command in NEEDS_OLDEST else [])
    except DevelopmentError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The next run goes on where this one was.", file=sys.stderr)
        return 130
    os.environ["DELTACONV_SETUP_SECONDS"] = f"{time.monotonic() - start:.1f}"
    # -I keeps this folder off the path: its `nodes` would shadow ComfyUI's module of that name.
    line = [python, "-I", "-m", "comfyui_deltaconv.development", command, *arguments]
    if os.name == "posix":
        sys.stdout.flush()
        os.execv(python, line)
    child = subprocess.Popen(line)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            # Ctrl-C reached the child as well; it cleans up and ends by itself.
            continue


if __name__ == "__main__":
    # Messages hold a Δ; a console with a narrow encoding shows a ? instead of failing.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))
