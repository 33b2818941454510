"""`python -m comfyui_deltaconv.kernels.bench`: time attention, its replacements and ours.

Writes JSON and prints a table in µs; `kernels.plot` draws the JSON. Nothing that computes
something wrong gets a time. --comfyui and --flops measure and count whole models.
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .accuracy import Error, distance
from .benchmark.contenders import BLOCKS, CONTENDERS, Contender
from .benchmark.measure import (
    captured,
    copy_bandwidth,
    extra_memory,
    fp32_rate,
    interleaved,
    once,
    saved_for_backward,
)
from .benchmark.rows import MODELS, ROWS, SMALL, SWEEP, Row, floors
from .selftest import default_device, device_name

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# A single call longer than this is not repeated: attention at 16384² takes minutes.
LONGEST_CALL = 1.0
TOO_LONG = "one call takes {:.1f} s"


def error_of(row: Row, contender: Contender, dtype: torch.dtype, device: torch.device) -> Error:
    """Distance from float64 at the row's channels and kernel, on a map that float64 affords."""
    x = random_input(row._replace(side=min(row.side, 40)), 1, dtype, device)
    return distance(contender.run(x), contender.exact(x.cpu().double()))


def random_input(row: Row, batch: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """x [batch, tokens, C] of the size that follows a norm."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, row.tokens, row.dim)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def build(row: Row, dtype: torch.dtype, device: torch.device, names) -> tuple[dict, dict]:
    """Contenders that are right, and a sentence for each that is not to be timed."""
    ready, left_out = {}, {}
    own = None
    for name in sorted(names, key=lambda name: name != "nchw"):  # torch's own error comes first
        try:
            contender = CONTENDERS[name](row, dtype, device)
            error = error_of(row, contender, dtype, device)
        except Exception as problem:
            # One contender that a device cannot run must not end the others' measurement.
            left_out[name] = f"cannot run ({type(problem).__name__}: {problem})".split("\n")[0]
            continue
        # Whatever is not our block has no other implementation beside it to be held against.
        right = error.worst <= 32 * torch.finfo(dtype).eps
        if name in BLOCKS and own is not None:
            right = right and error.within(own, dtype)
        if not right:
            left_out[name] = f"WRONG RESULT, not timed: {error}, torch's own {own}"
            continue
        own = error if name == "nchw" else own
        ready[name] = contender
    return {name: ready[name] for name in names if name in ready}, left_out


@torch.no_grad()
def measure_forward(row: Row, batch: int, dtype, device, names, repeats: int) -> dict:
    """Eager and graph times, peak extra memory, reasons of those left out."""
    contenders, left_out = build(row, dtype, device, names)
    x = random_input(row, batch, dtype, device)
    calls = {}
    for name, contender in contenders.items():
        call = (lambda run: lambda: run(x))(contender.run)
        try:
            seconds = once(call, device)
            if LONGEST_CALL < seconds < 10 * LONGEST_CALL:
                seconds = once(call, device)  # the first one may have compiled
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
            continue
        if seconds > LONGEST_CALL:
            left_out[name] = TOO_LONG.format(seconds)
            continue
        calls[name] = call
    result = {"eager": interleaved(calls, device, repeats), "left_out": left_out}
    if device.type == "cuda":
        result["memory"] = {name: extra_memory(call) for name, call in calls.items()}
        replays = {}
        for name, call in calls.items():
            try:
                replays[name] = captured(call)
            except RuntimeError as error:
                left_out[f"{name} as a graph"] = str(error).split("\n")[0]
        result["graph"] = interleaved(replays, device, repeats)
    return result


def measure_training(row: Row, batch: int, dtype, device, repeats: int) -> dict:
    """Forward and backward of the block, and what autograd keeps in between."""
    contenders, left_out = build(row, dtype, device, ("nchw", "nhwc", "ours"))
    x = random_input(row, batch, dtype, device).requires_grad_()
    calls, saved = {}, {}
    for name, contender in contenders.items():
        tensors = [x, *(tensor.requires_grad_() for tensor in contender.tensors)]
        saved[name] = saved_for_backward(lambda run=contender.run: run(x), tensors)

        def call(run=contender.run, tensors=tensors):
            return torch.autograd.grad(run(x).sum(), tensors)

        calls[name] = call
    timing = interleaved(calls, device, repeats)
    return {"eager": timing, "saved": saved, "left_out": left_out}


def environment(device: torch.device) -> dict:
    """Device, driver and versions: a figure without them says nothing."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    driver = None
    if device.type == "cuda" and (tool := shutil.which("nvidia-smi")):
        line = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(line, capture_output=True, text=True).stdout.split("\n")[0]
    return {
        "device": device_name(device),
        "driver": driver,
        "torch": torch.__version__,
        "triton": version,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--device", default=None, help="default: the GPU, or the CPU without one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16, on a CPU fp32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    sets = ("rows", "sweep", "models", "training", "small")
    parser.add_argument("--only", choices=sets, action="append", help="default: all but small")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument(
        "--comfyui",
        metavar="PATH",
        help="whole models through this ComfyUI: stock and ours need its comfy/ alone; ToMe, "
        "HyperTile and EasyCache are its own nodes and need the whole tree (comfy_extras, comfy_api, "
        "comfy_execution, folder_paths). Weights are random, so EasyCache skips other steps than "
        "with a trained model: read how many it computed beside its time",
    )
    parser.add_argument("--flops", action="store_true", help="count operations instead of time")
    options = parser.parse_args(argv)
    if options.flops or options.comfyui:
        # Whole models need the layers above this one, so they are found by name and only here.
        models = importlib.import_module("..development.whole_models", __package__)
        return models.main(options)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"expected --json in a folder that exists, got {options.json}")
    device = torch.device(options.device) if options.device else default_device()
    on_cpu = device.type == "cpu"
    chosen = options.only or (["small"] if on_cpu else [s for s in sets if s != "small"])
    dtype = DTYPES[options.dtype or ("fp32" if on_cpu else "fp16")]
    run(device, dtype, options.batch, options.repeats, chosen, options.json)
    return 0


def run(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    repeats: int,
    chosen: Sequence[str],
    path: Path | None = None,
) -> dict:
    """Everything that was chosen, as one JSON-ready report; prints and writes as it goes."""
    bandwidth, rate = copy_bandwidth(device), fp32_rate(device)
    about = environment(device) | {"copy_bytes_per_second": bandwidth, "fp32_per_second": rate}
    about |= {"dtype": str(dtype).removeprefix("torch."), "batch": batch, "repeats": repeats}
    print("\n".join(f"{key}: {value}" for key, value in about.items() if value is not None))
    rows = {"rows": ROWS, "sweep": SWEEP, "small": SMALL}
    report = {"environment": about, "results": []}

    def record(kind: str, row: Row, result: dict, count: int = 1, group: str = "") -> None:
        bound = floors(row, batch, dtype.itemsize, bandwidth, rate)
        entry = {"kind": kind, "group": group, "count": count, **row._asdict(), "floors": bound}
        report["results"].append(entry | result)
        print_row(report["results"][-1])
        if path:
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for kind in chosen:
        print(f"\n{kind}: µs, median (eager{', graph' if device.type == 'cuda' else ''})")
        too_long: dict[str, str] = {}
        for row in rows.get(kind, ()):
            # The sweep grows from row to row: what is too slow once would only get slower.
            names = [name for name in CONTENDERS if kind != "sweep" or name not in too_long]
            result = measure_forward(row, batch, dtype, device, names, repeats)
            result["left_out"] |= {name: too_long[name] for name in too_long if name not in names}
            for name, reason in result["left_out"].items():
                if reason.startswith(TOO_LONG.split("{")[0]):
                    too_long[name] = f"not tried: at {row.name} {reason}"
            record(kind, row, result)
        if kind == "models":
            for group, sites in MODELS.items():
                for row, count in sites:
                    names = ("attn1", "nchw", "ours")
                    result = measure_forward(row, batch, dtype, device, names, repeats)
                    record(kind, row, result, count, group)
        if kind in ("training", "small"):
            for row in SMALL if kind == "small" else [row for row in ROWS if row.side <= 64]:
                record("training", row, measure_training(row, batch, dtype, device, repeats))
    return report


def print_row(entry: dict) -> None:
    """One line per contender set, one per contender that was left out."""
    name = f"{entry['group']} {entry['name']}".strip()
    cells = []
    for contender, eager in entry["eager"].items():
        cell = f"{contender} {eager['median'] * 1e6:.0f}"
        if graph := entry.get("graph", {}).get(contender):
            cell += f", {graph['median'] * 1e6:.0f}"
        if "saved" in entry:
            cell += f" ({entry['saved'][contender] / 2**20:.1f} MiB kept)"
        cells.append(cell)
    bound = max(value for value in entry["floors"].values() if value) * 1e6
    shape = f"C={entry['dim']} k={entry['kernel_size']} H=W={entry['side']}"
    print(f"{name}, {shape}, {entry['kind']}: {'; '.join(cells)}; floor {bound:.1f}", flush=True)
    for contender, reason in entry["left_out"].items():
        print(f"    {contender}: {reason}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
