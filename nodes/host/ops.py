"""Operations for blocks: ComfyUI's casting ones, whose Linears also lend their weights."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import comfy.ops
import torch

from ...deltaconv.block import Lent

Weights = tuple[torch.Tensor, ...]


class LendingCast(comfy.ops.manual_cast):
    """`comfy.ops.manual_cast` with Linears whose weights a fused op may use directly."""

    @staticmethod
    def lend(
        linears: Sequence[torch.nn.Module], like: torch.Tensor
    ) -> AbstractContextManager[Weights | None]:
        """Context: weight, bias, weight, bias … in `like`'s dtype on its device, or None.

        None means that the modules must be called: a hook, another forward, a missing bias or a
        quantized weight does more than multiply and add. Functions on the weights, as of a LoRA
        that ComfyUI did not merge, are applied.
        """
        dtype, device = like.dtype, like.device
        tensors, ready = [], True
        for linear in linears:
            # Read the dictionaries: this runs before every launch, and Module's own lookup takes
            # ten times as long.
            own, parameters = linear.__dict__, linear._parameters
            weight, bias = parameters.get("weight"), parameters.get("bias")
            plain = type(linear) is comfy.ops.manual_cast.Linear and "forward" not in own
            # Compare types: a quantized weight also passes isinstance.
            plain = plain and type(weight) is type(bias) is torch.nn.Parameter
            if not plain or linear._forward_hooks or linear._forward_pre_hooks:
                return Lent(None)
            tensors += (weight, bias)
            # `_v` is a place in dynamic VRAM; the weights that run are there, not in the module.
            if "_v" in own or linear.weight_function or linear.bias_function:
                ready = False
            elif weight.dtype != dtype or bias.dtype != dtype:
                ready = False
            elif weight.device != device or bias.device != device:
                ready = False
        return Lent(tuple(tensors)) if ready else _cast(linears, like)


@contextmanager
def _cast(linears: Sequence[torch.nn.Module], like: torch.Tensor) -> Iterator[Weights]:
    """Context: weights cast and moved as ComfyUI does for a call, released at its end."""
    tensors, borrowed = [], []
    try:
        for linear in linears:
            cast = comfy.ops.cast_bias_weight(linear, like, offloadable=True)
            weight, bias, (stream, *_) = cast
            if stream is None:
                borrowed.append((linear, cast))
            else:
                # Copy: the next transfer over the stream may overwrite its single buffer.
                try:
                    weight, bias = weight.clone(), bias.clone()
                finally:
                    comfy.ops.uncast_bias_weight(linear, *cast)
            tensors += (weight, bias)
        yield tuple(tensors)
    finally:
        for linear, cast in borrowed:
            comfy.ops.uncast_bias_weight(linear, *cast)
