"""`python dev.py scale`: what distilling each family on many devices needs, and what it takes here.

Without an option: parameters, bytes on the network, in memory and on disk, by formula, with the
base's parameters as ComfyUI's own classes count them. --measure trains a model of real size with
random weights on this machine's device, a few steps of each stage, and prints seconds, images per
second and the peak of memory; `demo` is the packaged one.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from ..cli.host import entered
from ..deltaconv.scale.cost import Load, hours, step_seconds, trained_parameters
from .comfyui.tree import chosen_tree

# Family → latent [C, H, W] of a training picture, conditioning of a caption, what is published:
# steps and images per step.
LOADS = {
    "sd1": ((4, 64, 64), [(77, 768)], (60_000, 16)),
    "sdxl": ((4, 128, 128), [(77, 2048), (1280,)], (200_000, 8)),
    "pixart": ((4, 64, 64), [(300, 4096)], (200_000, 16)),
    # Nothing is published; steps and batch are PixArt's.
    "anima": ((16, 128, 128), [(512, 1024)], (200_000, 16)),
}
MEASURED = ("demo", "sd1", "sdxl", "pixart")
_GIB = 2**30


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--measure", choices=MEASURED, action="append", help="may be repeated")
    parser.add_argument("--batch", type=int, default=4, help="images per step and device")
    parser.add_argument("--steps", type=int, default=6, help="of each stage")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument(
        "--rate", type=float, help="images per second of a device, for hours and devices"
    )
    parser.add_argument("--bandwidth", type=float, default=10.0, help="GB/s between processes")
    options = parser.parse_args(argv)
    with entered(chosen_tree(), accelerator=bool(options.measure)):
        if options.measure:
            report = [measured(name, options.batch, options.steps) for name in options.measure]
        else:
            report = [needed(name, options.rate, options.bandwidth) for name in LOADS]
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def needed(family: str, rate: float | None, bandwidth: float) -> dict[str, object]:
    """What a family needs, by formula; prints it."""
    from ..deltaconv.distillation import default_kernels
    from ..deltaconv.families import FAMILIES

    known = FAMILIES[family]
    # A family without published kernels has one level of resolution.
    by_size = default_kernels(dict.fromkeys(known.dims, 0))
    kernels = {site: known.published_kernel(site) or by_size[site] for site in known.dims}
    latent, conditioning, (steps, batch) = LOADS[family]
    load = Load(
        base_parameters(family), trained_parameters(known.dims, kernels), latent, conditioning
    )
    found: dict[str, object] = {
        "family": family,
        "base_parameters": load.base,
        "trained_parameters": load.trained,
        "network_bytes_per_step": {n: load.network_bytes(n) for n in (2, 8, 64)},
        "memory_bytes_before_activations": load.memory_bytes(),
        "state_bytes": load.state_bytes(),
        "item_bytes": load.item_bytes(),
    }
    print(
        f"{family}: base {load.base / 1e6:.0f} M, blocks {load.trained / 1e6:.1f} M parameters; "
        f"{load.network_bytes(8) / 1e6:.0f} MB per step and process among 8; "
        f"{load.memory_bytes() / _GIB:.1f} GiB before activations; "
        f"a state {load.state_bytes() / 1e9:.2f} GB; "
        f"2 M items {2e6 * load.item_bytes() / 1e12:.2f} TB"
    )
    if rate:
        for count in (1, 8):
            seconds = step_seconds(rate, batch, count, load.network_bytes(count), bandwidth * 1e9)
            total = hours(steps, seconds)
            found[f"hours_of_{count}"] = total
            print(f"  {steps} steps of {batch} images on {count}: {total:.0f} h")
    return found


def base_parameters(family: str) -> int:
    """Of ComfyUI's own class, without memory for them."""
    import comfy.supported_models
    import torch

    from ..benchmarks.models import MODELS

    name, config = MODELS[family][:2]
    made = getattr(comfy.supported_models, name)(config)
    model = made.get_model({}, "", device=torch.device("meta"))
    return sum(parameter.numel() for parameter in model.diffusion_model.parameters())


def measured(name: str, batch: int, steps: int) -> dict[str, object]:
    """Medians over the steps of each stage but the first, which loads; prints them."""
    import torch

    from ..deltaconv.distillation import default_kernels, default_settings, distill
    from ..deltaconv.distillation.settings import StageSettings
    from ..kernels.device import environment
    from ..nodes.host.teacher import ComfyTeacher

    data, model = random_data(name, 4 * batch)
    teacher = ComfyTeacher(model, differentiable=True, name=name)
    cuda = teacher.device.type == "cuda"
    # Every step its own pass of the teacher: what keeping it brings is computed below.
    stage = {"batch": batch, "warmup": 0, "updates": 1}
    settings = default_settings(
        init="random",
        precision="bfloat16" if cuda else "float32",
        checkpointing=cuda,
        layers=StageSettings(steps, **stage),
        joint=StageSettings(steps, **stage),
    )
    seconds: dict[str, list[float]] = {"layers": [], "joint": []}
    peaks: dict[str, int] = {}
    with teacher:
        recipe = default_kernels(teacher.model_sites.levels)
        for record in distill(teacher, recipe, data, settings):
            if record.stage in seconds:
                if record.step > 1:
                    seconds[record.stage].append(record.seconds)
                peaks[record.stage] = record.memory or 0
                if cuda and record.step == record.steps:
                    torch.cuda.reset_peak_memory_stats()
        passes = teacher_seconds(teacher, data, batch, steps)
    found: dict[str, object] = {"family": name, "batch": batch}
    found["environment"] = environment(teacher.device)
    for stage_name, values in seconds.items():
        found[stage_name] = {
            "seconds": median(values),
            "low": min(values),
            "high": max(values),
            "images_per_second": batch / median(values),
            "peak_bytes": peaks[stage_name],
        }
        print(
            f"{name} {stage_name}: {median(values):.3f} s per step of {batch} images "
            f"({min(values):.3f} … {max(values):.3f}), {batch / median(values):.2f} images/s, "
            f"peak {peaks[stage_name] / _GIB:.2f} GiB",
            flush=True,
        )
    # A layer step is a pass of the teacher and the blocks' own work on what it saw.
    teacher_pass, whole = median(passes), median(seconds["layers"])
    blocks = max(whole - teacher_pass, 0.0)
    found["teacher_pass_seconds"] = teacher_pass
    found["gain_of_keeping_activations"] = {
        updates: whole / (teacher_pass / updates + blocks) for updates in (2, 4, 8)
    }
    # Each of n processes would run the teacher on the images of all, and 1 / n of the sites.
    found["gain_of_sharing_sites"] = {n: whole / (n * teacher_pass + blocks) for n in (2, 4, 8)}
    print(
        f"{name}: {teacher_pass:.3f} s of a layer step are the teacher's pass; updates per pass "
        f"{_said(found['gain_of_keeping_activations'])}; sites shared by processes "
        f"{_said(found['gain_of_sharing_sites'])}",
        flush=True,
    )
    return found


def _said(gains: dict[int, float]) -> str:
    return ", ".join(f"{count}: {gain:.2f} ×" for count, gain in gains.items())


def teacher_seconds(teacher, data, batch: int, repeats: int) -> list[float]:
    """Seconds of each pass of the teacher over a batch, without blocks; the first one loads."""
    import torch

    x = torch.stack([data.latents[row] for row in range(batch)]).to(teacher.device)
    conditions = [data.conditions[row] for row in range(batch)]
    found = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            # Reading a value waits for the device.
            teacher.predict(x, x.new_ones(batch), conditions).sum().item()
            found.append(time.perf_counter() - started)
    return found[1:]


def random_data(name: str, count: int):
    """A data set of random latents and captions, and the MODEL that they fit."""
    import torch

    from ..deltaconv import demo
    from ..deltaconv.distillation import Dataset
    from ..kernels.device import default_device
    from ..nodes.host.demo_model import load_demo_model

    generator = torch.Generator().manual_seed(0)

    def entries(shapes: Sequence[tuple[int, ...]]) -> list:
        context, *pooled = (torch.randn((1, *shape), generator=generator) for shape in shapes)
        return [(context, {"pooled_output": pooled[0]} if pooled else {}) for _ in range(count)]

    if name == "demo":
        pictures, captions = demo.pictures()
        encoder = demo.text_encoder()
        conditions = [(encoder.encode(caption), {}) for caption in captions[:count]]
        return Dataset(list(pictures[:count]), conditions, conditions[0]), load_demo_model()
    from ..benchmarks.models import build

    latent, conditioning, _ = LOADS[name]
    conditions = entries(conditioning)
    latents = [torch.randn(latent, generator=generator) for _ in range(count)]
    device = default_device()
    model = build(name, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    return Dataset(latents, conditions, conditions[0]), model
