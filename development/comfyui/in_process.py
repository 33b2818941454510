"""ComfyUI inside this process: one tree per process, on the path and set before it is imported."""

import sys
from pathlib import Path


def enter(tree: Path, base: Path, *, accelerator: bool = False) -> None:
    """Make `import comfy` find `tree`, writing under `base` alone.

    It computes on the CPU in float32, unless `accelerator` lets it use one where torch has it.
    Must come before anything of ComfyUI is imported; its command-line settings are read at import.
    """
    if "comfy" in sys.modules or "folder_paths" in sys.modules:
        raise RuntimeError(f"Expected no ComfyUI in this process yet, got {sys.modules['comfy']}.")
    sys.path.insert(0, str(tree))
    import torch
    from comfy.cli_args import args

    if not (accelerator and torch.accelerator.is_available()):
        args.cpu = True
        # Some CPUs would be given bfloat16.
        args.force_fp32 = True
    args.base_directory = str(base)
