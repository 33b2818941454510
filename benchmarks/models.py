"""Whole models with random weights in ComfyUI's own classes, and operations by formula.

`model_steps` has what is timed.
"""

import gc
import math
import sys
from pathlib import Path

import torch

from ..deltaconv.families import FAMILIES, resolution_level
from ..deltaconv.flops import (
    PAPER_BLOCK_OPERATIONS,
    attention_flops,
    block_flops,
    halved,
    paper_attention_operations,
)
from ..deltaconv.geometry import BlockGeometry
from ..kernels.device import environment
from . import BenchmarkError
from .report_file import ReportFile

_SD = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
}
# Family → ComfyUI's class, its configuration, sizes in pixels.
MODELS = {
    "sd1": (
        "SD15",
        _SD
        | {
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * 9 + [0] * 3,
            "use_linear_in_transformer": False,
            "context_dim": 768,
            "adm_in_channels": None,
        },
        (512, 768, 1024, 2048),
    ),
    "sdxl": (
        "SDXL",
        _SD
        | {
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "context_dim": 2048,
            "adm_in_channels": 2816,
        },
        (1024, 2048, 4096),
    ),
    "pixart": (
        "PixArtSigma",
        {
            "image_model": "pixart_sigma",
            "depth": 28,
            "hidden_size": 1152,
            "num_heads": 16,
            "input_size": 64,
            "micro_condition": False,
            "pe_interpolation": 1,
        },
        (512, 1024),
    ),
    "anima": (
        "Anima",
        {
            "image_model": "anima",
            "max_img_h": 240,
            "max_img_w": 240,
            "max_frames": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 2048,
            "num_blocks": 28,
            "num_heads": 16,
            "concat_padding_mask": True,
            "crossattn_emb_channels": 1024,
            "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True,
            "pos_emb_interpolation": "crop",
            "min_fps": 1,
            "max_fps": 30,
            "use_adaln_lora": True,
            "adaln_lora_dim": 256,
            "extra_per_block_abs_pos_emb": False,
            "rope_h_extrapolation_ratio": 4.0,
            "rope_w_extrapolation_ratio": 4.0,
            "rope_t_extrapolation_ratio": 1.0,
            "rope_enable_fps_modulation": False,
        },
        (1024,),
    ),
}


def count() -> dict:
    """Operations by formula, as one JSON-ready report; prints them."""
    return {"flops": flops_table(), "headline": headline_table()}


def run(
    tree: Path,
    device: torch.device,
    batch: int,
    repeats: int,
    file: ReportFile,
) -> dict:
    """Steps of whole models of the ComfyUI in `tree`, as one JSON-ready report.

    Prints and writes it as it goes; steps that the file has are not measured again. Raises
    BenchmarkError if `tree` is no ComfyUI.
    """
    _enter(tree, device)
    from .model_steps import measure

    report = file.open(environment(device) | {"comfyui": _version()})
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    # The sizes that most people draw at first, of every family; on a CPU one small map only shows
    # that everything works.
    sizes = [(family, pixels) for family, model in MODELS.items() for pixels in model[-1]]
    sizes.sort(key=lambda each: each[1] > 1024)
    for family, pixels in [("sd1", 128)] if device.type == "cpu" else sizes:
        if not file.wants(family=family, pixels=pixels, batch=batch):
            continue
        # The model before this one must be gone, or its weights count as memory.
        gc.collect()
        patcher = build(family, dtype, device)
        step = measure(family, pixels, patcher, dtype, batch, repeats)
        del patcher
        file.add(step)
    return report


def flops_table() -> list[dict[str, float]]:
    """All self-attention of SD1.5 against all its ΔConvBlocks, 512² to 16384² pixels."""
    family, rows = FAMILIES["sd1"], []
    print("SD1.5, one image: pixels, attention FLOP, ΔConv FLOP, ratio")
    for pixels in (512 << n for n in range(6)):
        attention = blocks = 0
        for site, dim in family.dims.items():
            side = halved(pixels // 8, resolution_level(site))
            geometry = BlockGeometry(dim, family.published_kernel(site), 2)
            attention += attention_flops(dim, side, side)
            blocks += block_flops(geometry, (1.0, 0.5), side, side)
        rows.append({"pixels": pixels, "attention": attention, "deltaconv": blocks})
        print(f"{pixels}² {attention:.3g} {blocks:.3g} {attention / blocks:.1f}")
    return rows


# Width and height in pixels of the paper's table; a token is 8 × 8 pixels.
_HEADLINE = ((512, 512), (1024, 1024), (3840, 2160), (15360, 8640))


def headline_table() -> list[dict[str, object]]:
    """The layer behind the paper's 6929 ×: C = 640, k = 9, by the paper's count and by ours."""
    dim, geometry, rows = 640, BlockGeometry(640, 9, 2), []
    print("\nOne layer, C = 640: pixels, attention as the paper counts, as we do, ΔConv, ratio")
    for across, down in _HEADLINE:
        height, width = down // 8, across // 8
        paper = paper_attention_operations(dim, height * width)
        attention = attention_flops(dim, height, width)
        block = block_flops(geometry, (1.0, 0.5), height, width)
        rows.append({"pixels": [across, down], "tokens": height * width})
        rows[-1] |= {"paper": paper, "attention": attention, "deltaconv": block}
        counts = " ".join(f"{count / 1e9:.2f} G" for count in (paper, attention, block))
        print(f"{across} × {down} {counts} {attention / block:.1f}")
    print(
        f"The paper divides {paper / 1e9:.2f} G by {PAPER_BLOCK_OPERATIONS / 1e9:.2f} G, which it "
        f"states for its block: {paper / PAPER_BLOCK_OPERATIONS:.0f} ×."
    )
    return rows


def _enter(tree: Path, device: torch.device) -> None:
    if not (tree / "comfy").is_dir():
        raise BenchmarkError(
            f"Expected --comfyui to be a folder with a comfy/ package in it, got {tree}."
        )
    sys.path.insert(0, str(tree))
    from comfy.cli_args import args

    args.cpu = device.type == "cpu"
    # Compare with torch's fastest attention.
    args.use_pytorch_cross_attention = True


def _version() -> str:
    """The tree's version; "0" for a bare `comfy` package."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "0"
    return __version__


def build(family: str, dtype: torch.dtype, device: torch.device):
    """A MODEL of ComfyUI's own class with small random weights."""
    import comfy.model_patcher
    import comfy.supported_models

    class_name, unet_config = MODELS[family][:2]
    config = getattr(comfy.supported_models, class_name)(unet_config)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=device).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan))
    return comfy.model_patcher.ModelPatcher(model, device, device)
