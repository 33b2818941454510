"""`python dev.py distill --config x.yaml`: distill the demo, or any checkpoint, from the terminal.

The configuration, all entries optional:

    model: demo                  # or the path of a checkpoint that ComfyUI loads
    data: demo                   # or a folder of pictures, each with a .txt of its caption
    prompts: [red apple]         # instead of data: train on the model's own samples
    samples: 64                  # how many of them
    size: 64                     # width and height of the pictures in pixels; default: the model's
    recipe: {<site>: [9, [1, 0.5]]}   # or a kernel alone; default: all sites, 11, 9, 7 by level
    gate: scaled
    preset: default              # or paper, or what the authors' code does instead: code-sd15,
                                 # code-sdxl, code-pixart (deltaconv/distillation/presets.py)
    settings: {layers: {steps: 300}, joint: {steps: 300}}   # what differs from the preset
    folder: output/distil        # state, log.jsonl and the weights, deltaconv.safetensors

It computes on torch's accelerator where there is one; --demo and --compare always on the CPU.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from . import ROOT, DevelopmentError
from .comfyui import in_process
from .comfyui.tree import chosen_tree
from .distil_compare import AUTHORS

_ENTRIES = {
    "model": str,
    "data": str,
    "prompts": list,
    "samples": int,
    "size": int,
    "recipe": dict,
    "gate": str,
    "preset": str,
    "settings": dict,
    "folder": str,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py distil",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="a YAML file; none: the demo, as it is")
    parser.add_argument(
        "--compare",
        type=float,
        metavar="MINUTES",
        help="our recipe against the authors', each for so long per seed",
    )
    parser.add_argument(
        "--against",
        choices=AUTHORS,
        default="paper",
        help="for --compare: the losses that the paper states, or those of the authors' code for "
        "SD1.5, the features alone",
    )
    parser.add_argument(
        "--demo", action="store_true", help="a few minutes of it on the demo, with a grid"
    )
    parser.add_argument("--seeds", type=int, default=3, help="for --compare")
    options = parser.parse_args(argv)
    config = read_config(options.config)
    with entered(accelerator=not (options.compare or options.demo)):
        if options.compare:
            from .distil_compare import compare_recipes

            # The paper's keeps the name that it had when it was the only one.
            name = "" if options.against == "paper" else f"-{options.against}"
            output = ROOT / "output" / f"distil-compare{name}.json"
            compare_recipes(options.compare, options.seeds, output, options.against)
        elif options.demo:
            from .distil_demo import distil_demo

            distil_demo(ROOT / "output")
        else:
            run(config)
    return 0


def read_config(path: Path | None) -> dict:
    """The entries of a YAML file. Raises DevelopmentError that lists every one that is wrong."""
    if path is None:
        return {}
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DevelopmentError(f"Expected a YAML file at {path}, got: {error}.") from error
    if not isinstance(config, dict):
        raise DevelopmentError(f"Expected entries by name in {path}, got {config!r:.60}.")
    from ..deltaconv.distillation import PRESETS

    problems = [f"unknown entry {name!r:.40}" for name in config if name not in _ENTRIES]
    problems += [
        f"{name}: expected {kind.__name__}, got {config[name]!r:.40}"
        for name, kind in _ENTRIES.items()
        if name in config and (not isinstance(config[name], kind) or config[name] is True)
    ]
    for name in ("size", "samples"):
        if type(config.get(name)) is int and not 1 <= config[name] <= 10**6:
            problems.append(f"{name}: expected 1 or more, got {config[name]}")
    for name, choices in (("preset", tuple(PRESETS)), ("gate", ("scaled", "sigmoid"))):
        if isinstance(config.get(name, ""), str) and config.get(name, choices[0]) not in choices:
            problems.append(f"{name}: expected one of {choices}, got {config[name]!r:.40}")
    if problems:
        raise DevelopmentError(f"{path} cannot be used: {'; '.join(problems)}.")
    return config


@contextmanager
def entered(accelerator: bool = False) -> Iterator[None]:
    """ComfyUI in this process, writing nowhere but into a folder that is removed again."""
    with tempfile.TemporaryDirectory(prefix="deltaconv-") as base:
        in_process.enter(chosen_tree(), Path(base), accelerator=accelerator)
        yield


def run(config: Mapping) -> None:
    """Distil as `config` says, printing a line now and then; resumes what its folder holds."""
    from ..deltaconv import write_weights
    from ..deltaconv.distillation import default_kernels, distill, weights_of

    folder = Path(config.get("folder", ROOT / "output" / "distil"))
    try:
        settings = chosen_settings(config)
        teacher = load_teacher(config, settings)
        recipe = config.get("recipe") or default_kernels(teacher.model_sites.levels)
        folder.mkdir(parents=True, exist_ok=True)
        # Before the teacher is loaded: a CLIP or VAE that needs its memory would push it out.
        data = chosen_data(config, teacher)
        gate = config.get("gate", "scaled")
        records = distill(teacher, recipe, data, settings, gate=gate, folder=folder / "state")
        log = open(folder / "log.jsonl", "a", encoding="utf-8")
        with log, teacher, closing(records):
            started = time.monotonic()
            for record in records:
                log.write(json.dumps(record.to_mapping(), allow_nan=False) + "\n")
                log.flush()
                if record.message or record.step in (1, record.steps) or record.step % 10 == 0:
                    print(line_of(record, time.monotonic() - started), flush=True)
            weights = weights_of(record.student, teacher, settings, steps=len(record.history))
    except (ValueError, OSError) as error:
        raise DevelopmentError(str(error)) from error
    path = write_weights(weights, folder / "deltaconv.safetensors", overwrite=True)
    print(f"Weights: {path}\nLog: {folder / 'log.jsonl'}")


def line_of(record, seconds: float) -> str:
    """A record for the terminal."""
    text = f"{seconds:7.0f} s  {record.stage:6} {record.step:6}/{record.steps}  "
    text += f"loss {record.loss:.5f}  lr {record.lr:.2e}  {record.images_per_second:.1f} images/s"
    return f"{text}  {record.message}".rstrip()


def chosen_settings(config: Mapping):
    """The preset with the configuration's own settings on top."""
    from ..deltaconv.distillation import PRESETS, DistillationSettings

    mapping = PRESETS[config.get("preset", "default")]().to_mapping()
    for name, value in (config.get("settings") or {}).items():
        nested = isinstance(value, Mapping) and name in ("layers", "joint")
        mapping[name] = {**mapping[name], **value} if nested else value
    return DistillationSettings.from_mapping(mapping)


def load_teacher(config: Mapping, settings):
    """The packaged demo teacher, or the checkpoint that the configuration names."""
    from ..deltaconv import demo
    from ..nodes.host.demo_model import load_demo_model
    from ..nodes.host.teacher import ComfyTeacher

    name = config.get("model", "demo")
    if name == "demo":
        model, title = load_demo_model(), f"the packaged demo ({demo.TEACHER_PATH.name})"
        clip = vae = None
    else:
        import comfy.sd

        if not Path(name).is_file():
            raise DevelopmentError(f"Expected a checkpoint, got {name}, which is not there.")
        try:
            model, clip, vae = comfy.sd.load_checkpoint_guess_config(name)[:3]
        except Exception as error:
            # Whatever its loaders raise for a file that is damaged or of no known model.
            raise DevelopmentError(f"ComfyUI cannot load {name}: {error!s:.200}.") from error
        if model is None:
            raise DevelopmentError(f"Expected a diffusion model in {name}, got none.")
        title = Path(name).name
    teacher = ComfyTeacher(model, differentiable=settings.joint.steps > 0, name=title)
    teacher.clip, teacher.vae = clip, vae
    return teacher


def chosen_data(config: Mapping, teacher):
    """The demo's pictures or a folder's; of prompts a function that draws the teacher's samples."""
    from ..deltaconv import demo
    from ..deltaconv.distillation import Dataset
    from ..deltaconv.distillation.own_samples import own_samples
    from ..deltaconv.families import native_latent
    from ..nodes.host.conditioning import encode_prompts

    pixels = 8 if teacher.vae is not None else 1
    size = config.get("size", pixels * native_latent(teacher.family))

    if size < pixels:
        raise DevelopmentError(f"Expected a size of {pixels} pixels or more, got {size}.")

    def encode(texts):
        return encode_prompts(teacher, list(map(str, texts)), teacher.clip)

    (unconditional,) = encode([""])
    if prompts := config.get("prompts"):
        channels = teacher.patcher.model.latent_format.latent_channels
        return partial(
            own_samples,
            teacher,
            encode(prompts),
            list(map(str, prompts)),
            unconditional,
            (channels, size // pixels, size // pixels),
            count=config.get("samples", 64),
            cache=ROOT / "output" / "distil-samples",
            progress=_say_tenths,
        )
    if config.get("data", "demo") == "demo":
        if teacher.family != demo.FAMILY:
            raise DevelopmentError("Expected data or prompts for a model of your own, got neither.")
        pictures, captions = demo.pictures()
        return Dataset(list(pictures), encode(captions), unconditional)
    pictures, captions = read_folder(Path(config["data"]), size)
    latents = [encode_picture(teacher, picture) for picture in pictures]
    return Dataset(latents, encode(captions), unconditional)


def _say_tenths(done: int, total: int) -> None:
    if 10 * done // total > 10 * (done - 1) // total:
        print(f"own samples: {done / total:.0%}", flush=True)


def read_folder(folder: Path, size: int) -> tuple[list, list[str]]:
    """Pictures [size, size, 3] in 0…1, cut to squares, and their captions from .txt files."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    endings = {".png", ".jpg", ".jpeg", ".webp"}
    if not folder.is_dir():
        raise DevelopmentError(f"Expected a folder of pictures, got {folder}, which is none.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
    if not files:
        raise DevelopmentError(f"Expected pictures ({', '.join(endings)}) in {folder}, got none.")
    pictures, captions = [], []
    for file in files:
        caption = file.with_suffix(".txt")
        try:
            picture = ImageOps.fit(Image.open(file).convert("RGB"), (size, size))
            captions.append(caption.read_text(encoding="utf-8").strip() if caption.exists() else "")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DevelopmentError(f"Cannot use {file}: {error}.") from error
        pictures.append(torch.from_numpy(np.array(picture, dtype=np.float32) / 255))
    return pictures, captions


def encode_picture(teacher, picture):
    """[H, W, 3] in 0…1 → latent [C, h, w]: through the VAE, or as it is for a model in pixels."""
    samples = picture[None]
    if teacher.vae is not None:
        samples = teacher.vae.encode(samples)
    else:
        samples = samples.movedim(-1, 1) * 2 - 1
    return teacher.latents_in(samples)[0].float().cpu()
