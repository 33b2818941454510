"""The locality report in Markdown: heading, verdict, table, legend."""

import math
import statistics

from ..families import family_title
from ..markdown import bullets, escaped, table
from .report import LocalityReport, SiteLocality, site_label

KINDS = {
    "even": "nearly even",
    "local": "decided by distance",
    "content": "decided by the picture",
}
_SHORT = {"even": "even", "local": "by distance", "content": "by picture"}
_EXPLAINED = {
    "even": "spread almost evenly over the whole map: the block's pooled branch covers them",
    "local": "described by the distance between query and key",
    "content": "decided by the picture more than by the distance: neither local nor constant, so "
    "they are judged by their sensitivity",
}
_COLUMNS = (
    "layer",
    "map",
    "mass in 9×9",
    "uniform",
    "distance",
    "uniform",
    "entropy",
    "log N",
    "local",
    "constant",
    "R²",
    "field",
    "looks",
    "cut to",
    "error",
    "block error",
    "kernel",
)


def report_text(report: LocalityReport) -> str:
    """Heading, a table with one line per site in network order, and its legend."""
    parts = [bullets(_heading(report)), _table(report), bullets(_explanation(report))]
    return "\n\n".join(parts)


def verdict(report: LocalityReport) -> str:
    """One sentence: how many layers look where."""
    counts = dict.fromkeys(KINDS, 0)
    for site in report.sites.values():
        counts[site.kind] += 1
    near = sum(s.mean("distance") > 0.95 * s.uniform_distance for s in report.sites.values())
    said = ", ".join(f"{count} {KINDS[kind]}" for kind, count in counts.items() if count)
    return (
        f"Where its {len(report.sites)} layers look: {said}. In {near} the mean distance "
        "is within 5% of uniform attention's or beyond it."
    )


def _heading(report: LocalityReport) -> list[str]:
    height, width = report.latent
    sigmas = ", ".join(f"{sigma:.3g}" for sigma in report.sigmas)
    percents = ", ".join(f"{100 * percent:.0f}%" for percent in report.percents)
    queries = "every query"
    if report.sampled_queries:
        queries = f"{report.sampled_queries} random queries per layer, so figures carry an error"
    lines = [
        f"Self-attention of {escaped(family_title(report.family))}, latent {width} × {height}, at "
        f"{percents} of sampling (sigma {sigmas}), {queries}.",
        verdict(report),
    ]
    lines += [
        f"Not measured: {escaped(site_label(p))}: {escaped(why)}"
        for p, why in report.left_out.items()
    ]
    return lines


def _table(report: LocalityReport) -> str:
    rows = [_COLUMNS, *(_row(site, report.share) for site in report.sites.values())]
    keep = [i for i in range(len(_COLUMNS)) if any(row[i] for row in rows[1:])]
    return table([[row[i] for i in keep] for row in rows])


def _row(site: SiteLocality, share: float) -> tuple[str, ...]:
    index = min(4, len(site.widths) - 1)
    field, sampled = site.field(share), [m.error for m in site.measurements if m.error]
    plus = {name: "" for name in ("mass", "distance", "entropy")}
    if sampled:
        plus["mass"] = f" ±{100 * _of_mean([e['mass'][index] for e in sampled]):.1f}"
        plus["distance"] = f" ±{_of_mean([e['distance'] for e in sampled]):.2f}"
        plus["entropy"] = f" ±{_of_mean([e['entropy'] for e in sampled]):.2f}"
    cut = site.sensitivity
    return (
        escaped(site_label(site.path)),
        f"{site.width}×{site.height}",
        f"{100 * site.mass[index]:.1f}%{plus['mass']}",
        f"{100 * site.uniform_mass[index]:.1f}%",
        f"{site.mean('distance'):.1f}{plus['distance']}",
        f"{site.uniform_distance:.1f}",
        f"{site.mean('entropy'):.2f}{plus['entropy']}",
        f"{math.log(site.tokens):.2f}",
        f"{100 * site.mean_fit('local_share'):.0f}%",
        f"{100 * site.mean_fit('constant_share'):.0f}%",
        f"{site.mean_fit('r2'):.2f}",
        "none" if field is None else f"{field}×{field}",
        _SHORT[site.kind],
        f"{cut.window}×{cut.window}" if cut.window_error else "",
        _error(cut.window_error),
        _error(cut.block_error),
        str(site.kernel(share)),
    )


def _explanation(report: LocalityReport) -> list[str]:
    share = f"{100 * report.share:.0f}%"
    lines = [
        "mass in 9×9: attention on keys at most 4 cells away in each direction. distance: mean, in "
        "latent cells of that layer. entropy: in nats, at most log N.",
        "local, constant: shares of the fit mass(d) ≈ a/(d² + c) + b, R² how well it describes the "
        "mean over queries; it says nothing about what differs from query to query.",
        f"field: smallest odd window with {share} of the mass above the constant part; kernel: the "
        "field, held to 3 … 17.",
    ]
    kinds = {site.kind for site in report.sites.values()}
    lines += [f"looks {_SHORT[kind]}: {_EXPLAINED[kind]}." for kind in _SHORT if kind in kinds]
    if any(site.sensitivity.error is not None for site in report.sites.values()):
        lines.append(
            "error: squared error of the predicted noise over its mean square, this layer alone "
            "cut to that window or replaced by its block."
        )
    return lines


def _error(errors: list[float] | None) -> str:
    return f"{100 * statistics.fmean(errors):.2g}%" if errors else ""


def _of_mean(errors: list[float]) -> float:
    """Standard error of the mean of independent values with these errors."""
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)
