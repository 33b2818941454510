"""`python -m comfyui_deltaconv.kernels.plot FILE.json`: the benchmark's JSON as a picture, a table.

--png writes cost against tokens on logarithmic axes (needs matplotlib); --table prints Markdown.
"""

import argparse
import json
import sys
from pathlib import Path

from .benchmark.contenders import CONTENDERS

LABELS = {
    "attn1": "self-attention",
    "linfus": "LinFusion",
    "pub": "ΔConv, published style",
    "nchw": "ΔConv, torch, NCHW",
    "nhwc": "ΔConv, torch, NHWC",
    "ours": "ΔConv, ours",
}


def times(entry: dict, way: str) -> dict[str, float]:
    """Contender → median seconds, `way` being eager or graph."""
    return {name: timing["median"] for name, timing in entry.get(way, {}).items()}


def table(report: dict) -> str:
    """The rows as a Markdown table in µs, eager and graph; the smaller sets behind it."""
    about = report["environment"]
    names = [name for name in CONTENDERS if any(name in e["eager"] for e in report["results"])]
    head = ["site", "C", "k", "H=W", *names, "floor", "ours / floor"]
    lines = [
        f"{about['device']}, {about['dtype']}, batch {about['batch']}, driver {about['driver']}, "
        f"torch {about['torch']}, triton {about['triton']}; median µs, eager (graph replay).",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for entry in report["results"]:
        if entry["kind"] == "training":
            continue
        eager, graph = times(entry, "eager"), times(entry, "graph")
        cells = []
        for name in names:
            cell = f"{eager[name] * 1e6:.0f}" if name in eager else "–"
            cells.append(f"{cell} ({graph[name] * 1e6:.0f})" if name in graph else cell)
        floor = max(value for value in entry["floors"].values() if value)
        best = graph.get("ours", eager.get("ours"))
        ratio = f"{best / floor:.1f}" if best else "–"
        row = [f"{entry['group']} {entry['name']}".strip(), entry["dim"], entry["kernel_size"]]
        row += [entry["side"], *cells, f"{floor * 1e6:.1f}", ratio]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", *totals(report)]
    return "\n".join(lines)


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


def draw(report: dict, path: Path) -> None:
    """Cost of one call against tokens, a line per contender, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {entry["kind"] for entry in report["results"]}
    kind = "sweep" if "sweep" in kinds else next(k for k in ("rows", "small") if k in kinds)
    entries = [entry for entry in report["results"] if entry["kind"] == kind]
    entries.sort(key=lambda entry: entry["side"])
    way = "graph" if any(times(entry, "graph") for entry in entries) else "eager"
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name in CONTENDERS:
        points = [(e["side"] ** 2, times(e, way)[name]) for e in entries if name in times(e, way)]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=LABELS[name])
    floor = [(e["side"] ** 2, max(v for v in e["floors"].values() if v)) for e in entries]
    axes.plot(*zip(*floor, strict=True), "k:", label="floor: bytes, or arithmetic")
    axes.set(xscale="log", yscale="log", xlabel="tokens (H·W)", ylabel="seconds per call")
    about = report["environment"]
    how = "CUDA-graph replay" if way == "graph" else "eager"
    site = f"C = {entries[0]['dim']}, k = {entries[0]['kernel_size']}"
    axes.set_title(f"{about['device']}, {how}\n{about['dtype']}, batch {about['batch']}, {site}")
    axes.legend()
    axes.grid(True, which="major", alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="plot", description=__doc__)
    parser.add_argument("report", type=Path, help="JSON that kernels.bench wrote")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(argv)
    report = json.loads(options.report.read_text(encoding="utf-8"))
    if options.table or not options.png:
        print(table(report))
    if options.png:
        draw(report, options.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
