"""Detect out-of-memory errors across backends."""

import torch

# CPU allocators (Linux, Windows), Apple's GPUs and ComfyUI raise a plain RuntimeError.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that a device, the CPU or ComfyUI ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)
