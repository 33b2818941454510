"""`python -m comfyui_deltaconv.benchmarks.plot FILE.json`: the benchmark's JSON, drawn or tabled.

--png writes cost against tokens on logarithmic axes (needs matplotlib); --table prints Markdown,
the table of benchmarks/README.md.
"""

import argparse
import json
import sys
from pathlib import Path

from .contenders import CONTENDERS

HEADINGS = {
    "attn1": "self-attention",
    "linfus": "LinFusion",
    "linear": "LinFusion, fused",
    "pub": "published style",
    "fft": "FFT",
    "nchw": "torch, NCHW",
    "nhwc": "torch, NHWC",
    "ours": "ours",
    "bands": "ours, tensor cores",
}
STEP_TITLES = {"sd1": "SD1.5", "sdxl": "SDXL", "pixart": "PixArt-Σ", "anima": "Anima"}
TRAINING = ("training", "training sweep")
# Elements that all five launches read and write, per token and C; see kernels/README.md.
MOVED = 5.875


def times(entry: dict, way: str) -> dict[str, float]:
    """Contender → median seconds, `way` being eager or graph."""
    return {name: timing["median"] for name, timing in entry.get(way, {}).items()}


def table(report: dict) -> str:
    """Markdown in µs: rows and sweep, then the sites of whole models, then training."""
    about = report["environment"]
    replayed = any(entry.get("graph") for entry in report["results"])
    how = "µs as CUDA-graph replay (eager in brackets)" if replayed else "µs, eager"
    lines = [
        f"{about['device']}, {about['dtype']}, batch {about['batch']}, driver {about['driver']}, "
        f"torch {about['torch']}, Triton {about['triton']}; {how}, medians of {about['repeats']} "
        "interleaved repeats."
    ]
    kinds = {
        "": ("rows", "sweep", "small"),
        "The sites of one call of a model:": ("models",),
        "Forward and backward; MiB that autograd keeps, and beyond that at the peak:": TRAINING,
    }
    for title, wanted in kinds.items():
        entries = [entry for entry in report["results"] if entry["kind"] in wanted]
        if entries:
            lines += ["", *([title, ""] if title else []), *_rows(entries)]
    return "\n".join([*lines, "", *totals(report)]).rstrip()


def steps_table(report: dict) -> str:
    """Markdown of whole steps in ms: medians, the middle half of the repeats in brackets."""
    names = list(dict.fromkeys(name for entry in report["steps"] for name in entry["steps"]))
    lines = ["| | " + " | ".join(names) + " |", "|" + "---|" * (1 + len(names))]
    for entry in report["steps"]:
        cells = [f"{STEP_TITLES.get(entry['family'], entry['family'])} at {entry['pixels']}²"]
        for name in names:
            timing = entry["steps"].get(name)
            if timing is None:
                cells.append("–")
                continue
            middle, low, high = (f"{timing[k] * 1e3:.1f}" for k in ("median", "low", "high"))
            cells.append(f"{middle} ({low} to {high})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(entries: list[dict]) -> list[str]:
    names = [name for name in CONTENDERS if any(name in entry["eager"] for entry in entries)]
    training = entries[0]["kind"] in TRAINING
    last = ["kept", "peak", "torch / ours"] if training else ["floor", "ours / floor"]
    head = ["site", "C", "k", "H=W", *(HEADINGS[name] for name in names), *last]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for entry in entries:
        cells = [_site(entry), entry["dim"], entry["kernel_size"], entry["side"]]
        cells += [_cell(entry, name) for name in names]
        cells += _memory(entry) if training else _floor(entry)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _site(entry: dict) -> str:
    if "sweep" in entry["kind"]:
        return f"SD1.5 at {entry['name']}"
    count = f" ({entry['count']} ×)" if entry["group"] else ""
    return f"{entry['group']} {entry['name']}".strip() + count


def _cell(entry: dict, name: str) -> str:
    eager, graph = (times(entry, way).get(name) for way in ("eager", "graph"))
    if eager is None:
        return "–"
    main = _micro(graph) if "graph" in entry else _micro(eager)
    main = f"**{main}**" if name == "ours" else main
    return f"{main} ({_micro(eager)})" if "graph" in entry else main


def _micro(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:,.0f}".replace(",", " ")


def _floor(entry: dict) -> list[str]:
    floor = max(value for value in entry["floors"].values() if value)
    best = times(entry, "graph").get("ours", times(entry, "eager").get("ours"))
    return [f"{floor * 1e6:.1f}", f"{best / floor:.1f}" if best else "–"]


def _memory(entry: dict) -> list[str]:
    """Torch → ours for kept and peak memory; time of torch's faster form over ours."""
    cells = []
    for found in (entry["saved"], entry.get("memory", {})):
        pair = (found.get(name) for name in ("nchw", "ours"))
        cells.append(" → ".join("–" if n is None else f"{n / 2**20:.1f}" for n in pair))
    found = times(entry, "graph") or times(entry, "eager")
    torchs = [found[name] for name in ("nchw", "nhwc") if name in found]
    known = torchs and "ours" in found
    return [*cells, f"{min(torchs) / found['ours']:.2f}" if known else "–"]


def totals(report: dict) -> list[str]:
    """One sentence per model: all its sites together, attention against ours."""
    sentences = []
    for group in dict.fromkeys(e["group"] for e in report["results"] if e["group"]):
        entries = [entry for entry in report["results"] if entry["group"] == group]
        for way in ("eager", "graph"):
            sums = {
                name: sum(e["count"] * times(e, way)[name] for e in entries)
                for name in ("attn1", "ours")
                if all(name in times(e, way) for e in entries)
            }
            if len(sums) == 2:
                ratio = sums["attn1"] / sums["ours"]
                sentences.append(f"{group}, all sites, {way}: attention takes {ratio:.2f} × ours.")
    return sentences


def explain(report: dict) -> str:
    """Where each row's time goes, computed from the report alone, as Markdown in µs.

    Launches: the smallest site's time above its floor. Bytes: what all launches move, over copy
    bandwidth. Arithmetic: the floor's. Rest: measured time beyond these, where the convolution
    waits for loads and passes stay below copy bandwidth.
    """
    about, entries = report["environment"], report["results"]
    entries = [e for e in entries if "ours" in times(e, "graph") and e["kind"] not in TRAINING]
    if not entries:
        return "No row was replayed as a CUDA graph, so there is nothing to explain."
    smallest = min(entries, key=lambda entry: entry["side"])
    bound = max(value for value in smallest["floors"].values() if value)
    launches = times(smallest, "graph")["ours"] - bound
    lines = ["| site | k | H=W | measured | launches | bytes | arithmetic | rest | mostly |"]
    lines += ["|" + "---|" * 9]
    for entry in entries:
        if entry["kind"] == "models" and entry is not smallest:
            continue
        took, floors = times(entry, "graph")["ours"], entry["floors"]
        # The floor moves x and y, 2 of the 5⅞ C of all launches, and the weights.
        maps = (MOVED - 2) * about["batch"] * entry["side"] ** 2 * entry["dim"]
        wide = 4 if about["dtype"] == "float32" else 2
        parts = {
            "launches": launches,
            "bytes": floors["memory"] + maps * wide / about["copy_bytes_per_second"],
            "arithmetic": floors["arithmetic"] or 0.0,
        }
        parts["rest"] = took - sum(parts.values())
        cells = [_site(entry), entry["kernel_size"], entry["side"], f"{took * 1e6:,.1f}"]
        cells += [f"{value * 1e6:,.1f}" for value in parts.values()]
        cells.append(max(parts, key=parts.get))
        lines.append("| " + " | ".join(map(str, cells)).replace(",", " ") + " |")
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    """Cost of one call against tokens, a line per contender, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {entry["kind"] for entry in report["results"]}
    order = ("sweep", "rows", "small", *reversed(TRAINING), "models")
    kind = next(kind for kind in order if kind in kinds)
    entries = [entry for entry in report["results"] if entry["kind"] == kind]
    entries.sort(key=lambda entry: entry["side"])
    way = "graph" if any(times(entry, "graph") for entry in entries) else "eager"
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name in CONTENDERS:
        points = [(e["side"] ** 2, times(e, way)[name]) for e in entries if name in times(e, way)]
        if points:
            label = (
                HEADINGS[name]
                if name in ("attn1", "linfus", "linear")
                else f"ΔConv, {HEADINGS[name]}"
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    if kind not in TRAINING:
        floor = [(e["side"] ** 2, max(v for v in e["floors"].values() if v)) for e in entries]
        axes.plot(*zip(*floor, strict=True), "k:", label="floor: bytes, or arithmetic")
    call = "forward and backward" if kind in TRAINING else "call"
    axes.set(xscale="log", yscale="log", xlabel="tokens (H·W)", ylabel=f"seconds per {call}")
    about = report["environment"]
    how = "CUDA-graph replay" if way == "graph" else "eager"
    sites = {(entry["dim"], entry["kernel_size"]) for entry in entries}
    site = "C = {}, k = {}".format(*sites.pop()) if len(sites) == 1 else "several sites"
    axes.set_title(f"{about['device']}, {how}\n{about['dtype']}, batch {about['batch']}, {site}")
    axes.legend()
    axes.grid(True, which="major", alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="plot", description=__doc__)
    parser.add_argument("report", type=Path, help="JSON that `deltaconv bench` wrote")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--explain", action="store_true", help="the distance to the floor, by row")
    options = parser.parse_args(argv)
    report = json.loads(options.report.read_text(encoding="utf-8"))
    if report.get("steps"):
        print(steps_table(report))
        return 0
    if not report.get("results"):
        parser.error(f"expected results of layers in {options.report}, got none")
    if options.table or not (options.png or options.explain):
        print(table(report))
    if options.explain:
        print(explain(report))
    if options.png:
        draw(report, options.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
