"""Time attention, its replacements and the ΔConvBlock, layer by layer.

Writes JSON and prints a table in µs; `plot` draws the JSON. Nothing that computes something wrong
at the shape that is timed gets a time.
"""

import time
from collections.abc import Sequence

import torch

from ..kernels.device import environment
from ..kernels.timing import copy_bandwidth, fp32_rate
from .contenders import CONTENDERS
from .report_file import ReportFile
from .shapes import MODELS, ROWS, SMALL, SWEEP, Row, floors
from .trial import TOO_LONG, TRAINED, measure_forward, measure_training


def run(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    repeats: int,
    chosen: Sequence[str],
    file: ReportFile,
) -> dict:
    """What was chosen of `SETS`, as one JSON-ready report; prints and writes it as it goes.

    Rows that the file has are not measured again; none is begun after its time is over.
    """
    start = time.monotonic()
    bandwidth, rate = copy_bandwidth(device), fp32_rate(device)
    about = environment(device) | {"dtype": str(dtype).removeprefix("torch.")}
    about |= {"batch": batch, "repeats": repeats}
    report = file.open(about)
    # Of the first run, if this one goes on with it: floors must fit each other.
    report["environment"].setdefault("copy_bytes_per_second", bandwidth)
    report["environment"].setdefault("fp32_per_second", rate)
    bandwidth = report["environment"]["copy_bytes_per_second"]
    before = report.get("seconds", 0)
    about = report["environment"]
    print("\n".join(f"{key}: {value}" for key, value in about.items() if value is not None))

    def record(kind: str, row: Row, result: dict, count: int = 1, group: str = "") -> None:
        bound = floors(row, batch, dtype.itemsize, bandwidth, rate)
        entry = {"kind": kind, "group": group, "count": count, **row._asdict(), "floors": bound}
        report["seconds"] = before + time.monotonic() - start
        file.add(entry | result)
        print_row(entry | result)

    def wanted(kind: str, row: Row, group: str = "") -> bool:
        return file.wants(kind=kind, group=group, **row._asdict())

    def each(kind: str, rows: Sequence[Row], names: Sequence[str], measure) -> None:
        way = "eager, graph" if device.type == "cuda" else "eager"
        print(f"\n{kind}: µs, median ({way})")
        too_long: dict[str, str] = {}
        for row in rows:
            if not wanted(kind, row):
                continue
            tried = [name for name in names if name not in too_long]
            result = measure(row, batch, dtype, device, tried, repeats)
            result["left_out"] |= too_long
            # A sweep grows from row to row, so what was too slow is not tried again.
            for name, reason in result["left_out"].items() if "sweep" in kind else ():
                if reason.startswith((TOO_LONG.split("{")[0], "out of memory")):
                    too_long[name] = f"not tried: at {row.name} {reason}"
            record(kind, row, result)

    for kind in chosen:
        if kind in ("rows", "sweep", "small"):
            rows = {"rows": ROWS, "sweep": SWEEP, "small": SMALL}[kind]
            each(kind, rows, tuple(CONTENDERS), measure_forward)
        if kind == "models":
            print("\nmodels: µs, median")
            for group, sites in MODELS.items():
                for row, count in sites:
                    if not wanted(kind, row, group):
                        continue
                    names = ("attn1", "nchw", "ours")
                    result = measure_forward(row, batch, dtype, device, names, repeats)
                    record(kind, row, result, count, group)
        if kind == "training":
            each("training", ROWS, TRAINED, measure_training)
            each("training sweep", SWEEP, TRAINED, measure_training)
        if kind == "small":
            each("training", SMALL, TRAINED, measure_training)
    print(f"\n{report.get('seconds', 0):.0f} s in all")
    return report


def print_row(entry: dict) -> None:
    """A line with all times, one per tuned contender, one per contender left out."""
    name = f"{entry['group']} {entry['name']}".strip()
    cells = []
    for contender, eager in entry["eager"].items():
        cell = f"{contender} {eager['median'] * 1e6:.0f}"
        if graph := entry.get("graph", {}).get(contender):
            cell += f", {graph['median'] * 1e6:.0f}"
        if contender in entry.get("saved", {}):
            cell += f" ({entry['saved'][contender] / 2**20:.1f} MiB kept)"
        cells.append(cell)
    bound = max(value for value in entry["floors"].values() if value) * 1e6
    shape = f"C={entry['dim']} k={entry['kernel_size']} H=W={entry['side']}"
    print(f"{name}, {shape}, {entry['kind']}: {'; '.join(cells)}; floor {bound:.1f}", flush=True)
    for contender, levels in entry.get("tiles", {}).items():
        chosen = (f"{level['tile']} at {level['map'][1]}²" for level in levels)
        print(f"    {contender}: tiles {', '.join(chosen)}", flush=True)
    for contender, reason in entry["left_out"].items():
        print(f"    {contender}: {reason}", flush=True)
