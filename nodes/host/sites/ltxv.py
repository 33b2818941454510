"""LTX-Video with one frame. Sites are `transformer_blocks.{i}.attn1`."""

from collections.abc import Callable, Mapping

import torch

from .base import OTHERS, Size
from .transformer import GRID, TransformerSites

# What a prompt is cut to.
_T5_TOKENS = 128


class _Stream:
    """Stands for the hidden state in a block, which adds to it in place: each sum is a new tensor.

    Autograd needs the tensors before each sum, and so do features of the hidden state.
    """

    def __init__(self, value: torch.Tensor):
        self.value = value

    def __getattr__(self, name: str):
        return getattr(self.value, name)

    def __iadd__(self, other: torch.Tensor) -> "_Stream":
        self.value = self.value + other
        return self

    def addcmul_(self, a: torch.Tensor, b: torch.Tensor) -> "_Stream":
        self.value = torch.addcmul(self.value, a, b)
        return self

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        bare = [each.value if isinstance(each, cls) else each for each in arguments]
        return function(*bare, **(named or {}))


class LTXVSites(TransformerSites):
    """Sites of ComfyUI's `LTXVModel`: attn1(x, context, mask, pe, k_pe, transformer_options).

    A token is one latent cell. Guides come as further frames; their masks leave plain attention in
    place, as their tokens do. LTX-2, with sound beside the picture, is of another kind.
    """

    BLOCKS, ATTENTION = "transformer_blocks", "attn1"
    ARGUMENTS = ("context", "mask", "pe", "k_pe", "transformer_options")
    VALUE, HEADS, FOLLOWING = "to_v", "heads", "attn2"

    @classmethod
    def is_kind(cls, transformer: torch.nn.Module) -> bool:
        from comfy.ldm.lightricks.model import LTXVModel

        return type(transformer) is LTXVModel

    @classmethod
    def step(cls, transformer: torch.nn.Module) -> int:
        return transformer.patchifier.patch_size[-1]

    def beside(self, given: Mapping) -> str:
        # The module knows no attn1 patches.
        return "" if given.get("mask") is None else OTHERS

    def positions(self, diffusion_model, x: torch.Tensor, size: Size) -> dict:
        from comfy.ldm.lightricks.symmetric_patchifier import latent_to_pixel_coords

        _, cells = diffusion_model.patchifier.patchify(x.new_empty(len(x), 1, 1, *size))
        pixels = latent_to_pixel_coords(
            latent_coords=cells,
            scale_factors=diffusion_model.vae_scale_factors,
            causal_fix=diffusion_model.causal_temporal_positioning,
        )
        rate = 25
        return {"pe": diffusion_model._prepare_positional_embeddings(pixels, rate, x.dtype)}

    def without_mutation(self, original: Callable) -> Callable:
        def forward(x, *arguments, **named):
            stream = _Stream(x)
            original(stream, *arguments, **named)
            return stream.value

        return forward

    def text_shape(self, diffusion_model: torch.nn.Module) -> Size:
        return _T5_TOKENS, diffusion_model.caption_projection.linear_1.in_features

    def prompt(self, diffusion_model: torch.nn.Module) -> list:
        text = torch.randn(1, *self.text_shape(diffusion_model))
        # The model's forward asks for a mask.
        return [text, {"attention_mask": torch.ones(1, text.shape[1], dtype=torch.long)}]

    def note_grid(
        self,
        executor,
        x,
        timestep,
        context,
        attention_mask,
        frame_rate=25,
        transformer_options=None,
        *arguments,
        **named,
    ):
        """DIFFUSION_MODEL wrapper: x [B, C, T, H, W]; the model hands its options on by place."""
        options = {**(transformer_options or {}), GRID: self.grid_of(x)}
        rest = (timestep, context, attention_mask, frame_rate, options, *arguments)
        return executor(x, *rest, **named)
