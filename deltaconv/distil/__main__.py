"""`python -m comfyui_deltaconv.deltaconv.distil`: the command line, which brings the host."""

import importlib
import sys

if __name__ == "__main__":
    # By name: the core itself never imports what stands above it.
    root = __package__.removesuffix(".deltaconv.distil")
    command = importlib.import_module(f"{root}.development.__main__")
    sys.exit(command.main("distil", *sys.argv[1:]))
