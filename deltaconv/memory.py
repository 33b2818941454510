"""Running out of memory, whoever says so."""

import torch

# CPUs (Linux, Windows), Apple's GPUs and ComfyUI have no type for it.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a call failed for want of memory: of the device, of ComfyUI or of the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)
