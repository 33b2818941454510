"""The long tier: published files on models of real size, with random weights, on the CPU."""

import math
import time

import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock, read_weights
from comfyui_deltaconv.deltaconv.families import FAMILIES
from host_models import REAL, host_model
from published import published_paths
from safetensors.torch import save_file

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("comfy")]

# Family → what a call takes beside x: the encoded prompt's shape, other inputs.
INPUTS = {
    "sd1": ((1, 77, 768), {}),
    "sdxl": ((1, 77, 2048), {"y": (1, 2816)}),
    "pixart": ((1, 300, 4096), {}),
}


def model(family):
    """A MODEL of ComfyUI's own class and real size; weights small enough to stay finite."""
    built = host_model(*REAL[family], dtype=torch.float32)
    torch.manual_seed(0)
    for parameter in built.model.parameters():
        bound = 1 / math.sqrt(max(parameter[0].numel() if parameter.ndim > 1 else 1, 1))
        parameter.data.uniform_(-bound, bound) if parameter.ndim > 1 else parameter.data.fill_(0.5)
    return built


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

    context, extra = INPUTS[family]
    models = [patcher, *patcher.get_nested_additional_models()]
    comfy.model_management.load_models_gpu(models)
    torch.manual_seed(2)
    x = torch.randn(1, 4, 64, 64)
    extra = {name: torch.randn(shape) for name, shape in extra.items()}
    context = torch.randn(context)
    start = time.perf_counter()
    y = patcher.model.diffusion_model(x, torch.full((1,), 500.0), context=context, **extra)
    return y, time.perf_counter() - start


@pytest.mark.parametrize("family", INPUTS)
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
