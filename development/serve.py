"""`python dev.py serve`: ComfyUI with the pack loaded, for your browser, until Ctrl-C."""

import argparse
import time
from pathlib import Path

from . import ROOT
from .comfyui.server import has_accelerator, running
from .comfyui.tree import chosen_tree, version_of


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py serve", description=__doc__)
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument(
        "--base",
        type=Path,
        default=ROOT / "output" / "comfyui",
        help="folder for models, input, output and settings (default: output/comfyui)",
    )
    options, arguments = parser.parse_known_args(argv)
    tree = chosen_tree()
    where = {"base": options.base.resolve(), "port": options.port}
    print(f"Starting ComfyUI {version_of(tree)} …", flush=True)
    with running(tree, **where, cpu=not has_accelerator(), arguments=arguments) as server:
        print(f"ComfyUI is at {server.url} (Ctrl-C stops it). Its log: {server.log}", flush=True)
        try:
            while True:
                server.check_alive()
                time.sleep(0.5)
        except KeyboardInterrupt:
            print("\nStopped.")
    return 0
