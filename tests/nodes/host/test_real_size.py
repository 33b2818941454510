"""The long tier: published files on models of real size, with random weights, on the CPU."""

import math
import time

import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock, read_weights
from comfyui_deltaconv.deltaconv.families import FAMILIES
from published import published_paths
from safetensors.torch import save_file

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("comfy")]

SD = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "legacy": False,
    "use_checkpoint": False,
    "adm_in_channels": None,
}
SDXL = {
    **SD,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "context_dim": 2048,
    "adm_in_channels": 2816,
}
PIXART = {
    "image_model": "pixart_sigma",
    "depth": 28,
    "hidden_size": 1152,
    "num_heads": 16,
    "input_size": 64,
    "micro_condition": False,
    "pe_interpolation": 1,
}
MODELS = {
    "sd1": ("SD15", SD, (1, 77, 768), {}, torch.float32),
    "sdxl": ("SDXL", SDXL, (1, 77, 2048), {"y": (1, 2816)}, torch.float32),
    "pixart": ("PixArtSigma", PIXART, (1, 300, 4096), {}, torch.float32),
}


def model(family):
    """A MODEL of ComfyUI's own class and real size; weights small enough to stay finite."""
    import comfy.model_patcher
    import comfy.supported_models

    class_name, unet_config, *_, dtype = MODELS[family]
    config = getattr(comfy.supported_models, class_name)(unet_config)
    config.set_inference_dtype(dtype, None)
    built = config.get_model({}, "", device="cpu")
    torch.manual_seed(0)
    for parameter in built.parameters():
        bound = 1 / math.sqrt(max(parameter[0].numel() if parameter.ndim > 1 else 1, 1))
        parameter.data.uniform_(-bound, bound) if parameter.ndim > 1 else parameter.data.fill_(0.5)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(built, cpu, cpu)


def published_file(family, path):
    """A file as the authors publish it: all blocks of the family, half precision, random."""
    torch.manual_seed(1)
    known = FAMILIES[family]
    tensors = {}
    for site, published in published_paths(family).items():
        block = DeltaConvBlock(known.dims[site], known.published_kernel(site), gate=known.gate)
        for name, tensor in block.half().state_dict().items():
            tensors[f"base_ema:denoiser.{published}.conv1.{name}"] = tensor
    save_file(tensors, path)
    return path


def forward(patcher, family):
    """Output and seconds of one model call at 64 × 64 latent cells."""
    import comfy.model_management

    *_, context, extra, dtype = MODELS[family]
    models = [patcher, *patcher.get_nested_additional_models()]
    comfy.model_management.load_models_gpu(models)
    torch.manual_seed(2)
    x = torch.randn(1, 4, 64, 64, dtype=dtype)
    extra = {name: torch.randn(shape, dtype=dtype) for name, shape in extra.items()}
    context = torch.randn(context, dtype=dtype)
    start = time.perf_counter()
    y = patcher.model.diffusion_model(x, torch.full((1,), 500.0), context=context, **extra)
    return y, time.perf_counter() - start


@pytest.mark.parametrize("family", MODELS)
def test_published_files_on_models_of_real_size(tmp_path, family, record_property):
    from comfyui_deltaconv.nodes.apply import DeltaConvApply

    weights = read_weights(published_file(family, tmp_path / "published.safetensors"))
    with torch.inference_mode():
        base = model(family)
        before, stock = forward(base, family)
        patched, report = DeltaConvApply.execute(base, weights).args
        count = len(FAMILIES[family].dims)
        assert f"{count} of {count} self-attention layers replaced" in report
        got, seconds = forward(patched, family)
        after, _ = forward(base, family)
    assert before.isfinite().all() and got.isfinite().all()
    assert not torch.equal(got, before)
    assert torch.equal(after, before)
    record_property("seconds_stock", stock)
    record_property("seconds_patched", seconds)
    print(f"\n{family}: stock {stock:.2f} s, patched {seconds:.2f} s\n{report}")
