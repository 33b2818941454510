"""ComfyUI inside this process: found, put on the path, and set up before it is imported."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from . import CommandError


def find_comfyui(given: Path | None = None) -> Path:
    """The folder of the ComfyUI to use; the first that there is of these:

    `given`, the environment variable COMFYUI_PATH, the ComfyUI in whose custom_nodes this pack
    lies, the one that `import comfy` finds. Raises CommandError if one that is named is none, or
    there is none at all.
    """
    for name, path in (("--comfyui", given), ("COMFYUI_PATH", os.environ.get("COMFYUI_PATH"))):
        if path:
            tree = Path(path).expanduser().resolve()
            if not _is_comfyui(tree):
                raise CommandError(
                    f"Expected {name} to be a folder with ComfyUI's main.py and comfy/, got {tree}."
                    " Correct it, or leave it out to use the ComfyUI that the pack is installed in."
                )
            return tree
    # A pack that is linked into custom_nodes is imported by the link's path.
    custom_nodes = Path(__file__).absolute().parents[2]
    if custom_nodes.name == "custom_nodes" and _is_comfyui(custom_nodes.parent):
        return custom_nodes.parent
    importable = find_spec("comfy")
    for folder in (importable.submodule_search_locations or ()) if importable else ():
        if (Path(folder) / "model_patcher.py").is_file():
            return Path(folder).parent
    raise CommandError(
        "Expected a ComfyUI to load models with, got none: the pack lies in no ComfyUI's "
        "custom_nodes. Name ComfyUI's folder with --comfyui, or in the environment variable "
        "COMFYUI_PATH."
    )


def _is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def enter(tree: Path, base: Path, *, accelerator: bool = False) -> None:
    """Make `import comfy` find `tree`, writing under `base` alone.

    It computes on the CPU in float32, unless `accelerator` lets it use one where torch has it.
    Must come before anything of ComfyUI is imported; its command-line settings are read at import.
    """
    if "comfy" in sys.modules or "folder_paths" in sys.modules:
        found = sys.modules.get("comfy") or sys.modules["folder_paths"]
        raise RuntimeError(f"Expected no ComfyUI in this process yet, got {found}.")
    sys.path.insert(0, str(tree))
    import torch
    from comfy.cli_args import args

    if not (accelerator and torch.accelerator.is_available()):
        args.cpu = True
        # Some CPUs would be given bfloat16.
        args.force_fp32 = True
    args.base_directory = str(base)


@contextmanager
def entered(tree: Path, *, accelerator: bool = False) -> Iterator[None]:
    """`enter`, with a temporary folder for what ComfyUI would write."""
    with tempfile.TemporaryDirectory(prefix="deltaconv-") as base:
        enter(tree, Path(base), accelerator=accelerator)
        yield
