"""The operations blocks are built from: ComfyUI's casting ones, which also lend their weights."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import comfy.ops
import torch

Weights = tuple[torch.Tensor, ...]


class LendingCast(comfy.ops.manual_cast):
    """`comfy.ops.manual_cast`, whose Linears a fused op may use without calling them."""

    @staticmethod
    def lend(
        linears: Sequence[torch.nn.Module], like: torch.Tensor
    ) -> AbstractContextManager[Weights | None]:
        """A context that gives weight, bias, weight, bias … in `like`'s dtype, on its device.

        It gives None, which means: call the modules, where a call would do more than multiply and
        add, as with a hook, somebody else's forward, no bias or a quantized weight. Functions on
        the weights, as of a LoRA that ComfyUI did not merge, are applied.
        """
        dtype, device = like.dtype, like.device
        tensors, ready = [], True
        for linear in linears:
            # Dictionaries, because this runs before every launch and Module's own lookup of a
            # parameter, or of what is missing, takes ten times as long.
            own, parameters = linear.__dict__, linear._parameters
            weight, bias = parameters.get("weight"), parameters.get("bias")
            plain = type(linear) is comfy.ops.manual_cast.Linear and "forward" not in own
            # A quantized weight says that it is a Parameter too, but is of a type of its own.
            plain = plain and type(weight) is type(bias) is torch.nn.Parameter
            if not plain or linear._forward_hooks or linear._forward_pre_hooks:
                return _Ready(None)
            tensors += (weight, bias)
            # `_v` is a place in dynamic VRAM: what runs lies there, not in the module.
            if "_v" in own or linear.weight_function or linear.bias_function:
                ready = False
            elif weight.dtype != dtype or bias.dtype != dtype:
                ready = False
            elif weight.device != device or bias.device != device:
                ready = False
        return _Ready(tuple(tensors)) if ready else _cast(linears, like)


class _Ready:
    """A context with nothing to do; a generator in its place would cost more than the rest."""

    __slots__ = ("weights",)

    def __init__(self, weights: Weights | None):
        self.weights = weights

    def __enter__(self) -> Weights | None:
        return self.weights

    def __exit__(self, *_) -> None:
        pass


@contextmanager
def _cast(linears: Sequence[torch.nn.Module], like: torch.Tensor) -> Iterator[Weights]:
    """Weights as ComfyUI casts and moves them for a call, given back when the context ends."""
    tensors, borrowed = [], []
    try:
        for linear in linears:
            cast = comfy.ops.cast_bias_weight(linear, like, offloadable=True)
            weight, bias, (stream, *_) = cast
            if stream is None:
                borrowed.append((linear, cast))
            else:
                # What came over a stream lies in its one buffer, which the next may overwrite.
                try:
                    weight, bias = weight.clone(), bias.clone()
                finally:
                    comfy.ops.uncast_bias_weight(linear, *cast)
            tensors += (weight, bias)
        yield tuple(tensors)
    finally:
        for linear, cast in borrowed:
            comfy.ops.uncast_bias_weight(linear, *cast)
