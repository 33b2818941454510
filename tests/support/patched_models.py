"""What tests of patched MODELs share: the demo model and a small PixArt, applied and sampled."""

import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock, demo
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks


def apply(model, weights, **inputs):
    """(MODEL, report) of the node itself."""
    from comfyui_deltaconv.nodes.apply import DeltaConvApply

    return DeltaConvApply.execute(model, weights, **inputs).args


def condition(prompt):
    """What the demo model's encoder makes of a prompt, as ComfyUI hands it on."""
    return [[demo.text_encoder().encode(prompt), {}]]


def sample(model, size=(24, 16), batch=1, steps=2, cfg=4.0, prompt="red apple"):
    """A latent by ComfyUI's own sampling; size is height, width."""
    return sample_with(model, condition(prompt), size, batch, steps, cfg)


def sample_with(model, positive, size=(24, 16), batch=1, steps=2, cfg=4.0):
    """A latent for a positive conditioning, against the empty prompt."""
    import comfy.sample

    latent = torch.zeros(batch, 3, *size)
    noise = comfy.sample.prepare_noise(latent, 1)
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "normal", positive, condition(""), latent, seed=1
    )


def lora_state(base, part, rank=4):
    """A LoRA file's tensors on one part of every transformer block."""
    torch.manual_seed(0)
    state = {}
    for name, parameter in base.model.named_parameters():
        if part in name and name.endswith("weight") and parameter.ndim == 2:
            key = name.removesuffix(".weight")
            state[f"{key}.lora_up.weight"] = torch.randn(parameter.shape[0], rank) * 0.3
            state[f"{key}.lora_down.weight"] = torch.randn(rank, parameter.shape[1]) * 0.3
    assert state
    return state


def lora(base, part):
    """A real LoRA on one part of every transformer block, through ComfyUI's own loader."""
    import comfy.sd

    state = lora_state(base, part)
    return lambda model: comfy.sd.load_lora_for_models(model, None, state, 1.0, 1.0)[0]


@pytest.fixture
def pixart_weights():
    torch.manual_seed(1)
    blocks = {f"blocks.{i}.attn": DeltaConvBlock(48, 5, gate="sigmoid") for i in range(3)}
    return weights_of_blocks(blocks)


def sample_pixart(model, size=(36, 48), steps=2):
    import comfy.sample

    torch.manual_seed(2)
    context = torch.randn(1, 8, 32)
    latent = torch.zeros(1, 4, *size)
    noise = comfy.sample.prepare_noise(latent, 1)
    condition = [[context, {}]]
    return comfy.sample.sample(
        model, noise, steps, 3.0, "euler", "normal", condition, condition, latent, seed=1
    )
