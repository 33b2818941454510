"""The device that a command computes on."""

import torch

from ..kernels.device import default_device
from . import CommandError


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; without one the accelerator that torch finds, or the CPU."""
    if name is None:
        return default_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise CommandError(
            f"Expected --device to be one that torch has here, such as cpu or cuda, got {name!r}: "
            f"{reason:.200}"
        ) from error
