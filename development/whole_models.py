"""Whole models: one step through ComfyUI's own classes, and operations by formula.

What `kernels.bench --comfyui PATH` and `--flops` run. Weights are random: time and memory do not
depend on them.
"""

import json
import math
import sys
from pathlib import Path

import torch

from ..deltaconv import DeltaConvBlock
from ..deltaconv.cost import attention_flops, block_flops, halved
from ..deltaconv.families import FAMILIES, resolution_level
from ..deltaconv.layout import BlockGeometry
from ..deltaconv.weights import weights_of_blocks
from ..kernels.bench import environment
from ..kernels.benchmark.measure import interleaved, once
from ..kernels.selftest import default_device

_SD = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
}
# Family → ComfyUI's class, its configuration, context, what else a call takes, sizes in pixels.
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
        (77, 768),
        {},
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
        (77, 2048),
        {"y": 2816},
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
        (300, 4096),
        {},
        (512, 1024),
    ),
}

# Seconds of a step that is measured three times only.
LONG_STEP = 0.5


def main(options) -> int:
    report = {"flops": flops_table()} if options.flops else {}
    if options.comfyui:
        device = torch.device(options.device) if options.device else default_device()
        report |= {"environment": environment(device), "steps": []}
        _enter(Path(options.comfyui), device)
        # On a CPU one small map only shows that everything works.
        sizes = {family: model[-1] for family, model in MODELS.items()}
        for family, all_pixels in ({"sd1": (128,)} if device.type == "cpu" else sizes).items():
            for pixels in all_pixels:
                report["steps"].append(measure(family, pixels, device, options))
                _save(report, options)
    _save(report, options)
    return 0


def _save(report: dict, options) -> None:
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


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


def _enter(tree: Path, device: torch.device) -> None:
    if not (tree / "comfy").is_dir():
        sys.exit(f"Expected --comfyui to be a folder with a comfy/ package in it, got {tree}.")
    sys.path.insert(0, str(tree))
    from comfy.cli_args import args

    args.cpu = device.type == "cpu"
    # The fastest attention that torch has, so that ours is compared with the best.
    args.use_pytorch_cross_attention = True


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


def variants(family: str, patcher, dtype: torch.dtype) -> dict:
    """The stock model, ours, and what core offers instead; those that do not load are left out."""
    from ..nodes.application import Application
    from ..nodes.patch import attach, load_blocks
    from ..nodes.sites import find_sites

    known, model_sites = FAMILIES[family], find_sites(patcher)
    blocks = {
        site: DeltaConvBlock(dim, known.published_kernel(site), gate=known.gate)
        for site, dim in known.dims.items()
    }
    loaded = load_blocks(weights_of_blocks(blocks), tuple(blocks), known.gate, dtype)
    found = {"stock": patcher}
    found["deltaconv"] = attach(patcher, loaded, Application(model_sites, tuple(blocks)))
    if family == "pixart":
        return found
    try:
        from comfy_extras.nodes_hypertile import HyperTile
        from comfy_extras.nodes_tomesd import TomePatchModel

        found["tome 0.3"] = _of_node(TomePatchModel.execute(patcher, 0.3))
        found["hypertile 256"] = _of_node(HyperTile.execute(patcher, 256, 2, 0, False))
    except (ImportError, AttributeError) as error:
        print(f"    core's own nodes are left out: {error}")
    return found


def repeats_of(step, device: torch.device, options) -> int:
    """As many as asked for, three of a step that takes long, one on a CPU."""
    if device.type == "cpu":
        return 1
    step()
    return options.repeats if once(step, device) < LONG_STEP else 3


def _of_node(output):
    """The MODEL that a node of core gave: a NodeOutput, or from some a bare tuple."""
    return getattr(output, "result", output)[0]


@torch.inference_mode()
def measure(family: str, pixels: int, device: torch.device, options) -> dict:
    """Median step time and peak memory of every variant at one size."""
    import comfy.model_management

    cpu = device.type == "cpu"
    dtype = torch.float32 if cpu else torch.float16
    _, _, context, extra, _ = MODELS[family]
    patcher, side, batch = build(family, dtype, device), pixels // 8, options.batch
    x = torch.randn(batch, 4, side, side, dtype=dtype, device=device)
    context = torch.randn(batch, *context, dtype=dtype, device=device)
    extra = {name: torch.randn(batch, n, dtype=dtype, device=device) for name, n in extra.items()}
    steps = torch.full((batch,), 500.0, device=device)
    entry = {"family": family, "pixels": pixels, "steps": {}, "memory": {}}
    for name, variant in variants(family, patcher, dtype).items():
        loaded = [variant, *variant.get_nested_additional_models()]
        comfy.model_management.load_models_gpu(loaded)
        transformer_options = dict(variant.model_options["transformer_options"])
        arguments = extra
        if family != "pixart":
            arguments = extra | {"transformer_options": transformer_options}

        def step(model=variant.model.diffusion_model, arguments=arguments):
            return model(x, steps, context=context, **arguments)

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # Variants share one model object, so they cannot take turns within a repeat.
        entry["steps"] |= interleaved({name: step}, device, repeats_of(step, device, options))
        if device.type == "cuda":
            entry["memory"][name] = torch.cuda.max_memory_allocated()
        variant.unpatch_model(device)
    times = ", ".join(f"{name} {t['median'] * 1e3:.1f}" for name, t in entry["steps"].items())
    print(f"{family} at {pixels}², batch {batch}, ms: {times}", flush=True)
    return entry
