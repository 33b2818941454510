"""Time attention, its replacements and the ΔConvBlock on this machine.

Prints a table in µs, and writes JSON that `python -m comfyui_deltaconv.benchmarks.plot` draws.
Nothing that computes something wrong at the shape that is timed gets a time. Layers need torch
alone; --comfyui times whole models, --flops counts their operations.
"""

import argparse
import json
from pathlib import Path

from ..benchmarks import SETS, BenchmarkError
from . import CommandError

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: the GPU, or the CPU without one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16, on a CPU fp32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--only",
        choices=SETS,
        action="append",
        help="default: all but small; on a CPU small alone",
    )
    parser.add_argument("--json", type=Path, help="file to write, after every result")
    parser.add_argument(
        "--resume", action="store_true", help="go on with what is in the file of --json"
    )
    parser.add_argument(
        "--seconds", type=float, help="begin nothing after this; go on later with --resume"
    )
    parser.add_argument(
        "--comfyui",
        type=Path,
        metavar="PATH",
        help="whole models through this ComfyUI: stock and ours need its comfy/ alone; ToMe, "
        "HyperTile and EasyCache are its own nodes and need the whole tree (comfy_extras, "
        "comfy_api, comfy_execution, folder_paths). Weights are random, so EasyCache skips other "
        "steps than with a trained model: read how many it computed beside its time",
    )
    parser.add_argument("--flops", action="store_true", help="count operations instead of time")
    parser.add_argument(
        "--host",
        action="store_true",
        help="microseconds that one eager call costs the host; without a GPU up to the launches",
    )
    parser.add_argument(
        "--everything",
        type=Path,
        metavar="FOLDER",
        help="all of it in order of value, a file each in an existing folder, with --comfyui whole "
        "models first; what is there is not measured again",
    )
    parser.add_argument(
        "--cpu-step",
        action="store_true",
        help="the demo student's ten blocks on the CPU, as they run now and as first written",
    )


def run(options: argparse.Namespace) -> int:
    path = options.json
    if path and not path.absolute().parent.is_dir():
        raise CommandError(f"Expected --json in a folder that exists, got {path}. Make the folder.")
    if options.everything and not options.everything.is_dir():
        raise CommandError(
            f"Expected --everything to be a folder that exists, got {options.everything}. Make it."
        )
    if options.resume and not path:
        raise CommandError("Expected --json with --resume, the file to go on with, got none.")
    try:
        _measure(options, path)
    except BenchmarkError as error:
        raise CommandError(str(error)) from error
    return 0


def _measure(options: argparse.Namespace, path: Path | None) -> None:
    import torch

    from ..benchmarks import cpu_step, everything, host, layers, models
    from ..benchmarks.report_file import ReportFile
    from .device import chosen_device

    device = chosen_device(options.device)
    on_cpu = device.type == "cpu"
    dtype = getattr(torch, DTYPES[options.dtype or ("fp32" if on_cpu else "fp16")])
    limits = {"resume": options.resume, "seconds": options.seconds}
    if options.everything:
        everything.run(
            options.everything, options.comfyui, device, dtype, options.batch, options.seconds
        )
        return
    if options.flops:
        report = models.count()
        if path:
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return
    if options.comfyui:
        file = ReportFile(path, results="steps", **limits)
        models.run(options.comfyui, device, options.batch, options.repeats, file)
        return
    if options.cpu_step:
        cpu_step.run(options.batch, options.repeats, path)
        return
    if options.host:
        half = torch.float16 if options.dtype is None else dtype
        host.run(device, half, options.batch, ReportFile(path, **limits))
        return
    chosen = options.only or (["small"] if on_cpu else [s for s in SETS if s != "small"])
    file = ReportFile(path, **limits)
    layers.run(device, dtype, options.batch, options.repeats, chosen, file)
