"""Distill the packaged demo, or any checkpoint that ComfyUI loads, into ΔConv weights.

The configuration is a YAML file, all of its entries optional; without one the demo is distilled:

    model: demo                  # or the path of a checkpoint that ComfyUI loads
    data: demo                   # or a folder of pictures, each with a .txt of its caption; or
                                 # WebDataset shards, such as shards/{000..123}.tar; the demo's own
                                 # are in the repository alone: else it draws samples
    buckets: false               # true: cut pictures to the nearest of several aspect ratios
    corrupt: 0.0                 # the share of pictures that may be unreadable, and is skipped
    store: output/store          # train on what `deltaconv precompute` made of the data there
    workers: 0                   # processes that read the store ahead
    prompts: [red apple]         # instead of data: train on the model's own samples
    samples: 64                  # how many of them
    size: 64                     # width and height of the pictures in pixels; default: the model's
    recipe: {<site>: [9, [1, 0.5]]}   # or a kernel alone; behind: heads of pooled tokens
    kernels: by size             # without a recipe: all sites, 11, 9, 7 by level; or 5 and pooled
                                 # tokens: small ones, and an attention over 64 means of the map
    start: weights.safetensors   # weights to go on from in place of an initialization, with their
                                 # layers, kernels, gate and the step from which they act;
                                 # packaged: those of the demo
    choice: balanced             # without a recipe: which layers and steps get blocks; faithful
                                 # saves less time, fastest takes all of them
    minutes: 10                  # how long it may take; default: the steps of the settings
    gate: scaled                 # or sigmoid
    preset: default              # tokens (default is that for kernels with tokens), paper, or what
                                 # the authors' code does instead: code-sd15, code-sdxl, code-pixart
                                 # (deltaconv/distillation/presets.py)
    settings: {layers: {steps: 300}, joint: {steps: 300}}   # what differs from the preset
    folder: output/distill       # state, log.jsonl and the weights, deltaconv.safetensors
    tensorboard: false           # true: losses, rates and pictures in the folder, for TensorBoard
    pictures_every: 500          # steps between its pictures; 0: none
    stall: 600                   # seconds after which a process that hangs ends all of them

Paths are relative to the current folder. Samples of prompts are kept in output/distill-samples.
Ctrl-C saves; the same command goes on where it stopped. It computes on torch's accelerator where
there is one. `torchrun … -m comfyui_deltaconv.cli distill` and `accelerate launch -m …` spread the
same configuration over many GPUs and machines: docs/scale.md.
"""

import argparse
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import CommandError

if TYPE_CHECKING:
    from ..deltaconv.distillation.engine import Engine
    from ..deltaconv.scale.board import Board
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
    """Distill as configured, printing a line now and then; resumes what its folder holds.

    Started by torchrun or `accelerate launch`, each process takes its share of every batch.
    """
    from ..deltaconv.distillation.settings import DistillationError
    from ..deltaconv.scale.engine import chosen_engine

    try:
        engine = chosen_engine(Path(configuration.folder) / "state", configuration.stall)
    except DistillationError as error:
        raise CommandError(str(error)) from error
    with stopped_together(engine):
        _distill(configuration, engine)


def _distill(configuration: "Configuration", engine: "Engine") -> None:
    from ..deltaconv import write_weights
    from ..deltaconv.distillation import distill, weights_of
    from ..deltaconv.distillation.choice import FASTEST
    from ..deltaconv.distillation.settings import read_plan
    from ..nodes.host.distill_time import TimeBudget
    from .distill_config import chosen_settings
    from .distill_inputs import chosen_blocks, chosen_inputs, load_teacher

    folder = Path(configuration.folder)
    budget = TimeBudget(60 * (configuration.minutes or 0))
    try:
        settings = chosen_settings(configuration)
        for stage in (settings.layers, settings.joint):
            if stage.steps or budget:
                # Refused before the model is loaded.
                engine.rows(stage)
        encoders = not configuration.store
        teacher = load_teacher(configuration, settings, joint=bool(budget), encoders=encoders)
        start, recipe, gate = chosen_blocks(configuration, teacher)
        if start and "start" not in configuration.settings:
            settings = replace(settings, start=start.start)
        folder.mkdir(parents=True, exist_ok=True)
        # Before the teacher is loaded: a CLIP or VAE that needs its memory would push it out.
        inputs = chosen_inputs(configuration, teacher, budget.enough_samples, engine)
        plans = read_plan(recipe, teacher.dims)
        choose = None
        if not configuration.recipe and not start and configuration.choice != FASTEST:
            choose = _chooser(configuration, teacher, plans, gate, inputs, engine)
        log = open(folder / "log.jsonl" if engine.main else os.devnull, "a", encoding="utf-8")
        with log, teacher:
            settings = engine.shared(
                lambda: budget.fitted(settings, teacher, inputs.conditions, inputs.shape)
            )
            records = distill(
                teacher,
                plans,
                inputs.data,
                settings,
                gate=gate,
                start=start.blocks() if start else None,
                choose=choose,
                plan=budget.plan if budget else None,
                folder=folder / "state",
                engine=engine,
            )
            board = _board(configuration, teacher, inputs) if engine.main else None
            with closing(records), closing(board) if board else nullcontext():
                for record in records:
                    if board:
                        board.add(record)
                    log.write(json.dumps(record.to_mapping(), allow_nan=False) + "\n")
                    log.flush()
                    shown = record.message or record.step in (1, record.steps)
                    if engine.main and (shown or record.step % 10 == 0):
                        print(line_of(record, budget.spent), flush=True)
                    if budget.over and record.step < record.steps:
                        engine.ask_to_stop()
                    if engine.stopping and record.step < record.steps:
                        if engine.main:
                            why = "The time is over" if budget.over else "Stopped"
                            print(f"{why}; the same command goes on.", flush=True)
                        break
            weights = weights_of(
                record.student, teacher, record.settings, steps=len(record.history)
            )
        if not engine.main:
            return
        path = write_weights(weights, folder / "deltaconv.safetensors", overwrite=True)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    print(f"Weights: {path}\nLog: {folder / 'log.jsonl'}")


@contextmanager
def stopped_together(engine: "Engine") -> Iterator[None]:
    """Have Ctrl-C and a signal to end stop all of several processes after the same whole step.

    Launchers pass on what the terminal has sent already, so a second signal means the same. Leaving
    without an error lets go of the others.
    """
    if engine.alone:
        yield
        return

    def stop(number: int, frame: object) -> None:
        engine.ask_to_stop()

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), stop) for name in names}
    try:
        yield
        engine.close()
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def _board(configuration: "Configuration", teacher, inputs) -> "Board | None":
    """What writes for TensorBoard; None where it is not asked for."""
    if not configuration.tensorboard:
        return None
    from ..deltaconv.scale.board import Board
    from ..nodes.host.preview import decoded

    return Board(
        Path(configuration.folder) / "tensorboard",
        teacher,
        inputs.conditions,
        inputs.unconditional,
        inputs.shape,
        lambda latent: decoded(teacher, latent),
        configuration.pictures_every,
    )


def _chooser(configuration: "Configuration", teacher, plans, gate: str, inputs, engine: "Engine"):
    """What chooses layers and steps, and says so; None where there is nothing to choose.

    The first of several processes measures and chooses for all: clocks differ.
    """
    from ..nodes.host.distill_choice import chooser

    choose = engine.main and chooser(
        teacher.patcher,
        teacher,
        plans,
        gate,
        inputs.shape,
        conditions=inputs.conditions,
        unconditional=inputs.unconditional,
        wanted=configuration.choice,
        seed=0,
        said=lambda sentence: print(sentence, flush=True),
    )
    if engine.shared(lambda: choose is None):
        return None
    return choose or _asked_in_the_first_process


def _asked_in_the_first_process(blocks) -> NoReturn:
    raise AssertionError("Expected `Engine.shared` to ask the first process alone.")


def line_of(record, seconds: float) -> str:
    """A record for the terminal."""
    text = f"{seconds:7.0f} s  {record.stage:6} {record.step:6}/{record.steps}  "
    text += f"loss {record.loss:.5f}  lr {record.lr:.2e}  {record.images_per_second:.1f} images/s"
    return f"{text}  {record.message}".rstrip()
