"""ComfyUI's own classes, small and of real size, of every family without published blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import anima_model
import torch
from host_models import host_model, stored_model

TEXT = 32
# Families whose latents are of another format than those of their kind.
_OTHER_CLASS = {"wan2.2-5b": "WAN22_T2V"}


@dataclass(frozen=True)
class Kind:
    """A family's class in ComfyUI, a small configuration of it, and those of real size by family.

    `size` is a latent's height and width, padded inside the model where it can be; `map_size` the
    tokens that are made of it. `chosen` names the parameters that get weights.
    """

    name: str
    class_name: str
    small: Mapping
    real: Mapping[str, Mapping]
    path: str
    dim: int
    map_size: tuple[int, int]
    size: tuple[int, int] = (13, 18)
    depth: int = 3
    channels: int = 16
    frames: bool = True
    extras: Callable[[], dict] = field(default=dict)
    chosen: Callable[[str], bool] = field(default=lambda name: True)

    @property
    def sites(self) -> list[str]:
        """Site paths of the small model."""
        return [self.path.format(index) for index in range(self.depth)]

    def real_model(self, family):
        """A MODEL of real size without memory for its weights."""
        class_name = _OTHER_CLASS.get(family, self.class_name)
        return host_model(class_name, dict(self.real[family]), "meta")

    def build(self, device="cpu", dtype=None):
        """A small MODEL with random weights."""
        return weighted(host_model(self.class_name, dict(self.small), device, dtype), self.chosen)

    def loaded(self, stored=torch.float32, compute=torch.float32):
        """A small MODEL as ComfyUI's loaders make it, which can be loaded again for training."""
        small = self.build()
        state = dict(small.model.diffusion_model.state_dict())
        return stored_model(small.model.model_config, state, stored, compute)

    def latent(self, size=None, batch=1, frames=1):
        """An empty latent."""
        size = self.size if size is None else size
        return torch.zeros(batch, self.channels, *((frames,) if self.frames else ()), *size)

    def prompt(self, seed=2):
        """CONDITIONING of random numbers."""
        torch.manual_seed(seed)
        return [[torch.randn(1, 8, TEXT), self.extras()]]

    def sample(self, model, steps=2, latent=None, positive=None, negative=None, **options):
        """A latent by ComfyUI's own sampling."""
        import comfy.sample

        latent = self.latent() if latent is None else latent
        positive = self.prompt() if positive is None else positive
        noise = comfy.sample.prepare_noise(latent, 1)
        negative = self.prompt(3) if negative is None else negative
        arguments = (3.0, "euler", "simple", positive, negative, latent)
        return comfy.sample.sample(model, noise, steps, *arguments, seed=1, **options)


def weighted(patcher, chosen=lambda name: True):
    """Random weights as trained ones are: outputs as large as inputs, norms that hardly scale."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in patcher.model.named_parameters():
        if not chosen(name):
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            noise *= 0.1
        elif parameter.ndim == 1:
            noise = 1 + 0.1 * noise
        elif name.endswith("weight"):
            noise /= parameter[0].numel() ** 0.5
        else:
            # Tables of shifts, scales and gates.
            noise *= 0.5
        parameter.data.copy_(noise)
    return patcher


def _cosmos(name):
    return anima_model.config(name)


_COSMOS_REAL = {"crossattn_emb_channels": 1024}
_TWO_B = {**_COSMOS_REAL, "model_channels": 2048, "num_blocks": 28, "num_heads": 16}
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
    "out_dim": 16,
}


def _wan(dim, layers, **changes):
    size = {"dim": dim, "ffn_dim": 4 * dim, "num_layers": layers, "num_heads": dim // 128}
    return {**_WAN, **size, **changes}


def _hunyuan_extras():
    return {
        "attention_mask": torch.ones(1, 8),
        "conditioning_mt5xl": torch.randn(1, 16, TEXT),
        "attention_mask_mt5xl": torch.ones(1, 16),
    }


_HYDIT = {"image_model": "hydit", "depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637}
_KANDINSKY = {
    "image_model": "kandinsky5",
    "model_dim": 2560,
    "ff_dim": 10240,
    "time_dim": 512,
    "axes_dims": (32, 48, 48),
    "rope_scale_factor": (1.0, 1.0, 1.0),
    "visual_embed_dim": 64,
    "num_text_blocks": 2,
    "num_visual_blocks": 50,
}
_LTXV = {"image_model": "ltxv", "attention_head_dim": 64, "cross_attention_dim": 2048}

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "Anima",
            "Anima",
            _cosmos("Anima"),
            {"anima": {**_cosmos("Anima"), **_TWO_B}},
            "blocks.{}.self_attn",
            64,
            (7, 9),
            # Its text modules take no part; they are large and stay untouched.
            chosen=lambda name: "llm_adapter" not in name,
        ),
        Kind(
            "Cosmos-Predict2",
            "CosmosT2IPredict2",
            _cosmos("CosmosT2IPredict2"),
            {
                "cosmos-predict2": {**_cosmos("CosmosT2IPredict2"), **_TWO_B},
                "cosmos-predict2-14b": {
                    **_cosmos("CosmosT2IPredict2"),
                    **_COSMOS_REAL,
                    "model_channels": 5120,
                    "num_blocks": 36,
                    "num_heads": 40,
                },
            },
            "blocks.{}.self_attn",
            64,
            (7, 9),
        ),
        Kind(
            "HunyuanDiT",
            "HunyuanDiT",
            {
                "image_model": "hydit",
                "depth": 4,
                "hidden_size": 64,
                "num_heads": 4,
                "text_states_dim": TEXT,
                "text_states_dim_t5": TEXT,
                "text_len": 8,
                "text_len_t5": 16,
            },
            {"hunyuandit": _HYDIT},
            "blocks.{}.attn1",
            64,
            (7, 9),
            depth=4,
            channels=4,
            frames=False,
            extras=_hunyuan_extras,
        ),
        Kind(
            "Wan",
            "WAN21_T2V",
            {**_wan(64, 3), "num_heads": 2, "text_dim": TEXT, "text_len": 8},
            {
                "wan-1.3b": _wan(1536, 30, ffn_dim=8960),
                "wan-14b": _wan(5120, 40, ffn_dim=13824),
                "wan2.2-5b": _wan(3072, 30, ffn_dim=14336, in_dim=48, out_dim=48),
            },
            "blocks.{}.self_attn",
            64,
            (7, 9),
        ),
        Kind(
            "Kandinsky 5",
            "Kandinsky5Image",
            {
                **_KANDINSKY,
                "model_dim": 64,
                "ff_dim": 128,
                "time_dim": 16,
                "axes_dims": (8, 12, 12),
                "in_text_dim": TEXT,
                "in_text_dim2": 24,
                "num_text_blocks": 1,
                "num_visual_blocks": 3,
            },
            {"kandinsky5-image": _KANDINSKY},
            "visual_transformer_blocks.{}.self_attention",
            64,
            (7, 9),
            # It does not cut what it padded: such latents fail in ComfyUI itself.
            size=(14, 18),
            frames=False,
            extras=lambda: {"pooled_output": torch.randn(1, 24)},
        ),
        Kind(
            "LTX-Video",
            "LTXV",
            {
                **_LTXV,
                "in_channels": 128,
                "num_layers": 3,
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "cross_attention_dim": 64,
                "caption_channels": TEXT,
            },
            {
                "ltxv-2b": {**_LTXV, "num_layers": 28},
                "ltxv-13b": {
                    **_LTXV,
                    "num_layers": 48,
                    "attention_head_dim": 128,
                    "cross_attention_dim": 4096,
                },
            },
            "transformer_blocks.{}.attn1",
            64,
            (7, 9),
            size=(7, 9),
            channels=128,
            extras=lambda: {"attention_mask": torch.ones(1, 8, dtype=torch.long)},
        ),
    )
}
