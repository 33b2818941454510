"""MODELs of ComfyUI's own classes, and their configurations as its detection finds them, once."""

import torch
from comfyui_deltaconv.benchmarks.models import MODELS

# Family → ComfyUI's class and the configuration of a checkpoint of real size.
REAL = {family: (name, config) for family, (name, config, _) in MODELS.items()}
_SD, _XL = REAL["sd1"][1], REAL["sdxl"][1]
REAL["sd2"] = ("SD20", {**_SD, "context_dim": 1024, "use_linear_in_transformer": True})
REAL["sdxl-refiner"] = (
    "SDXLRefiner",
    {
        **_XL,
        "model_channels": 384,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
        "transformer_depth_middle": 4,
        "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
        "context_dim": 1280,
        "adm_in_channels": 2560,
    },
)
for _name, _class, _blocks, _down, _middle, _up in (
    ("ssd-1b", "SSD1B", 2, [0, 0, 2, 2, 4, 4], -1, [0, 0, 0, 1, 1, 2, 10, 4, 4]),
    ("segmind-vega", "Segmind_Vega", 2, [0, 0, 1, 1, 2, 2], -1, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
    ("koala-700m", "KOALA_700M", 1, [0, 2, 5], -2, [0, 0, 2, 2, 5, 5]),
    ("koala-1b", "KOALA_1B", 1, [0, 2, 6], 6, [0, 0, 2, 2, 6, 6]),
):
    REAL[_name] = (
        _class,
        {
            **_XL,
            "num_res_blocks": [_blocks] * 3,
            "transformer_depth": _down,
            "transformer_depth_middle": _middle,
            "transformer_depth_output": _up,
        },
    )
REAL["svd"] = (
    "SVD_img2vid",
    {
        **_SD,
        "in_channels": 8,
        "num_classes": "sequential",
        "use_linear_in_transformer": True,
        "context_dim": 1024,
        "adm_in_channels": 768,
        "use_temporal_attention": True,
        "use_temporal_resblock": True,
        "extra_ff_mix_layer": True,
        "use_spatial_context": True,
        "merge_strategy": "learned_with_images",
        "merge_factor": 0.0,
        "video_kernel_size": [3, 1, 1],
    },
)
# What makes each of those small enough to run in a test.
SMALL = {
    "sd1": {"model_channels": 32, "context_dim": 48},
    "sdxl": {
        "model_channels": 32,
        "context_dim": 48,
        "transformer_depth": [0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    },
    "pixart": {"depth": 2, "hidden_size": 32, "num_heads": 2},
    "anima": {
        "model_channels": 32,
        "num_blocks": 2,
        "num_heads": 2,
        "crossattn_emb_channels": 16,
        "adaln_lora_dim": 8,
    },
}
SMALL_PIXART = {
    "image_model": "pixart_sigma",
    "depth": 3,
    "hidden_size": 48,
    "num_heads": 4,
    "input_size": 16,
    "micro_condition": False,
    "caption_channels": 32,
    "model_max_length": 8,
    "pe_interpolation": 1,
}


def host_model(class_name, config, device="cpu", dtype=None):
    """A MODEL of that class; on the device meta without memory for its weights."""
    import comfy.model_patcher
    import comfy.supported_models

    made = getattr(comfy.supported_models, class_name)(config)
    if dtype is not None:
        made.set_inference_dtype(dtype, None)
    model = made.get_model({}, "", device=device)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def randomize(patcher, scale, chosen=lambda name: True):
    """Normal weights of that scale in every parameter that `chosen` takes; returns the MODEL."""
    torch.manual_seed(0)
    for name, parameter in patcher.model.named_parameters():
        if chosen(name):
            parameter.data.copy_(torch.randn_like(parameter) * scale)
    return patcher


def stored_model(config, state, stored, compute, disable_dynamic=False):
    """A MODEL whose weights are kept in `stored` and computed with in `compute`, loaded as
    ComfyUI's own loaders do; it says how to load it again."""
    import comfy.model_patcher

    # As ComfyUI's loaders choose: quantized layers always name what they compute in.
    cast = compute if compute != stored or config.quant_config else None
    config.set_inference_dtype(stored, cast)
    cpu = torch.device("cpu")
    model = config.get_model(state, "", device=cpu)
    patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    tensors = {
        name: tensor.to(stored) if tensor.dtype == torch.float32 else tensor
        for name, tensor in state.items()
    }
    model.load_model_weights(tensors, "")
    patcher.cached_patcher_init = (stored_model, (config, state, stored, compute))
    return patcher


def bits(model):
    """Every weight of the base, as the bytes that it is stored in."""
    found = {}
    for name, tensor in model.model.state_dict().items():
        whole = getattr(tensor, "_qdata", tensor).contiguous()
        found[name] = whole.reshape(-1).view(torch.uint8).clone()
    return found
