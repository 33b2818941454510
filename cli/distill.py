"""Distill the packaged demo, or any checkpoint that ComfyUI loads, into ΔConv weights.

The configuration is a YAML file, all of its entries optional; without one the demo is distilled:

    model: demo                  # or the path of a checkpoint that ComfyUI loads
    data: demo                   # or a folder of pictures, each with a .txt of its caption; the
                                 # demo's own are in the repository alone: else it draws samples
    prompts: [red apple]         # instead of data: train on the model's own samples
    samples: 64                  # how many of them
    size: 64                     # width and height of the pictures in pixels; default: the model's
    recipe: {<site>: [9, [1, 0.5]]}   # or a kernel alone; default: all sites, 11, 9, 7 by level
    choice: balanced             # without a recipe: which layers and steps get blocks; faithful
                                 # saves less time, fastest takes all of them
    minutes: 10                  # how long it may take; default: the steps of the settings
    gate: scaled                 # or sigmoid
    preset: default              # or paper, or what the authors' code does instead: code-sd15,
                                 # code-sdxl, code-pixart (deltaconv/distillation/presets.py)
    settings: {layers: {steps: 300}, joint: {steps: 300}}   # what differs from the preset
    folder: output/distill       # state, log.jsonl and the weights, deltaconv.safetensors

Paths are relative to the current folder. Samples of prompts are kept in output/distill-samples.
Ctrl-C saves; the same command goes on where it stopped. It computes on torch's accelerator where
there is one.
"""

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from . import CommandError

if TYPE_CHECKING:
    from .distill_config import Configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="a YAML file; none: the demo, as it is")
    parser.add_argument(
        "--comfyui",
        type=Path,
        metavar="PATH",
        help="ComfyUI's folder; default: COMFYUI_PATH, else the ComfyUI whose custom_nodes holds "
        "this pack, else the one that Python finds",
    )


def run(options: argparse.Namespace) -> int:
    from .distill_config import read_configuration
    from .host import entered, find_comfyui

    configuration = read_configuration(options.config)
    with entered(find_comfyui(options.comfyui), accelerator=True):
        distill_as(configuration)
    return 0


def distill_as(configuration: "Configuration") -> None:
    """Distill as configured, printing a line now and then; resumes what its folder holds."""
    from ..deltaconv import write_weights
    from ..deltaconv.distillation import default_kernels, distill, weights_of
    from ..deltaconv.distillation.settings import read_plan
    from ..nodes.host.distill_time import TimeBudget
    from .distill_config import chosen_settings
    from .distill_inputs import chosen_inputs, load_teacher

    folder, gate = Path(configuration.folder), configuration.gate
    budget = TimeBudget(60 * (configuration.minutes or 0))
    try:
        settings = chosen_settings(configuration)
        teacher = load_teacher(configuration, settings, joint=bool(budget))
        recipe = configuration.recipe or default_kernels(teacher.model_sites.levels)
        folder.mkdir(parents=True, exist_ok=True)
        # Before the teacher is loaded: a CLIP or VAE that needs its memory would push it out.
        inputs = chosen_inputs(configuration, teacher, budget.enough_samples)
        plans = read_plan(recipe, teacher.dims)
        choose = None if configuration.recipe else _chooser(configuration, teacher, plans, inputs)
        log = open(folder / "log.jsonl", "a", encoding="utf-8")
        with log, teacher:
            settings = budget.fitted(settings, teacher, inputs.conditions, inputs.shape)
            records = distill(
                teacher,
                plans,
                inputs.data,
                settings,
                gate=gate,
                choose=choose,
                plan=budget.plan if budget else None,
                folder=folder / "state",
            )
            with closing(records):
                for record in records:
                    log.write(json.dumps(record.to_mapping(), allow_nan=False) + "\n")
                    log.flush()
                    if record.message or record.step in (1, record.steps) or record.step % 10 == 0:
                        print(line_of(record, budget.spent), flush=True)
                    if budget.over and record.step < record.steps:
                        print("The time is over; the same command goes on.", flush=True)
                        break
            weights = weights_of(
                record.student, teacher, record.settings, steps=len(record.history)
            )
        path = write_weights(weights, folder / "deltaconv.safetensors", overwrite=True)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    print(f"Weights: {path}\nLog: {folder / 'log.jsonl'}")


def _chooser(configuration: "Configuration", teacher, plans, inputs):
    """What chooses layers and steps, and says so; None for all of them, or nothing to choose."""
    from ..deltaconv.distillation.choice import FASTEST
    from ..nodes.host.distill_choice import chooser

    if configuration.choice == FASTEST:
        return None
    choose = chooser(
        teacher.patcher,
        teacher,
        plans,
        configuration.gate,
        inputs.shape,
        conditions=inputs.conditions,
        unconditional=inputs.unconditional,
        wanted=configuration.choice,
        seed=0,
        said=lambda sentence: print(sentence, flush=True),
    )
    if choose is None:
        print("No block is faster than attention at this size: all are distilled.", flush=True)
    return choose


def line_of(record, seconds: float) -> str:
    """A record for the terminal."""
    text = f"{seconds:7.0f} s  {record.stage:6} {record.step:6}/{record.steps}  "
    text += f"loss {record.loss:.5f}  lr {record.lr:.2e}  {record.images_per_second:.1f} images/s"
    return f"{text}  {record.message}".rstrip()
