"""ComfyUI inside this process: one tree per process, on the path and set before it is imported."""

import sys
from pathlib import Path


def enter(tree: Path, base: Path) -> None:
    """Make `import comfy` find `tree`, computing on the CPU and writing under `base` alone.

    Must come before anything of ComfyUI is imported; its command-line settings are read at import.
    """
    if "comfy" in sys.modules or "folder_paths" in sys.modules:
        raise RuntimeError(f"Expected no ComfyUI in this process yet, got {sys.modules['comfy']}.")
    sys.path.insert(0, str(tree))
    from comfy.cli_args import args

    args.cpu = True
    # Some CPUs would be given bfloat16.
    args.force_fp32 = True
    args.base_directory = str(base)
