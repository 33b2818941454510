"""What a distillation on many devices needs: bytes on the network, on disk and in memory, hours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..geometry import BlockPlan

_FLOAT32, _FLOAT16 = 4, 2
# Per trained parameter in float32: master, gradient, two moments of AdamW, moving average.
_COPIES = 5
# Of an item in an Arrow file beside its tensors: names, sizes, offsets, the header of safetensors.
_ROW = 400


@dataclass(frozen=True)
class Load:
    """A model to distill: parameters of its base and of all its blocks, tensors of an item.

    `latent` is [C, H, W], `conditioning` the shapes of what a caption becomes.
    """

    base: int
    trained: int
    latent: tuple[int, ...]
    conditioning: Sequence[tuple[int, ...]]

    def network_bytes(self, processes: int) -> float:
        """Bytes that each process sends in a step: a ring's all-reduce of all gradients."""
        return 2 * (processes - 1) / processes * _FLOAT32 * self.trained

    def state_bytes(self) -> int:
        """Bytes of a state: masters, moving average, two moments; the file to apply beside it."""
        return 5 * _FLOAT32 * self.trained

    def memory_bytes(self, base_bytes: int = _FLOAT16) -> int:
        """Bytes on each device before activations: the base as it is stored, and training."""
        return base_bytes * self.base + _COPIES * _FLOAT32 * self.trained

    def item_bytes(self) -> int:
        """Bytes of an item of a store."""
        return _FLOAT16 * sum(map(prod, [self.latent, *self.conditioning])) + _ROW


def trained_parameters(dims: Mapping[str, int], kernels: Mapping[str, int]) -> int:
    """Of the blocks at sites of so many channels, with these kernels at scales 1 and 1/2."""
    return sum(BlockPlan(kernels[site]).geometry(dim).parameters for site, dim in dims.items())


def step_seconds(
    images_per_second: float, batch: int, processes: int, network_bytes: float, bandwidth: float
) -> float:
    """Seconds of a step of `batch` images in all, at one device's pace for its share.

    `bandwidth` is what each process sends per second; sending and computing are added, as if they
    never overlapped, which bounds the step from above.
    """
    return batch / processes / images_per_second + network_bytes / bandwidth


def hours(steps: int, seconds: float) -> float:
    """Hours of a training of so many steps."""
    return steps * seconds / 3600
