"""Plots of a locality report over all layers: `plot_model` on one page, `plot_cost` of a recipe."""

import math

import torch

from ..families import family_title
from ..flops import attention_flops
from ..pictures.figure import BLUE, GRAY, ORANGE, new_figure, plain
from .recipe import Recipe, cost_curve, recipe_computation, sensitivities
from .report import LocalityReport, SiteLocality, site_label
from .text import KINDS, verdict

_KIND_MARKS = {"even": ("o", GRAY), "local": ("s", BLUE), "content": ("D", ORANGE)}
_WINDOWS = (1, 3, 5, 9, 17, 33)


def plot_model(report: LocalityReport):
    """The model on one page: a row per site in network order, a column per question."""
    sites = list(report.sites.values())
    windows = [w for w in _WINDOWS if w <= max(max(s.widths) for s in sites)]
    sensitive = any(s.sensitivity.error is not None for s in sites)
    figure = new_figure(13.5 if sensitive else 11, 2.6 + 0.34 * len(sites))
    ratios = [4.2, 2.6, 2.6, 2.2] if sensitive else [4.2, 2.6, 2.2]
    axes = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios)
    figure.suptitle(
        f"Where the self-attention of {plain(family_title(report.family))} looks, layer by layer\n"
        f"{verdict(report)}",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    rows = range(len(sites))
    _windows_panel(figure, axes[0], sites, windows)
    _entropy_panel(axes[1], sites)
    if sensitive:
        _sensitivity_panel(axes[2], sites)
    _kernel_panel(axes[-1], sites, report.share)
    axes[0].set_yticks(rows, [f"{plain(site_label(s.path))}   {s.width}×{s.height}" for s in sites])
    axes[0].set_ylim(len(sites) - 0.5, -0.5)
    axes[0].set_ylabel("layer and its map, in the order in which the network runs them")
    for axis in axes:
        axis.tick_params(length=0)
        for index in rows[1:]:
            if sites[index].tokens != sites[index - 1].tokens:
                axis.axhline(index - 0.5, color="black", linewidth=0.6)
    return figure


def _windows_panel(figure, axis, sites: list[SiteLocality], windows: list[int]) -> None:
    from matplotlib.colors import LogNorm

    ratio = torch.full((len(sites), len(windows)), float("nan"))
    for row, site in enumerate(sites):
        for column, window in enumerate(windows):
            if window <= max(site.height, site.width):
                ratio[row, column] = site.mass[window // 2] / site.uniform_mass[window // 2]
    top = max(10.0, float(ratio.nan_to_num(1).max()))
    norm = LogNorm(0.5, top)
    axis.imshow(ratio.clamp_min(0.5).numpy(), norm=norm, cmap="cividis", aspect="auto")
    for row, column in torch.argwhere(~ratio.isnan()).tolist():
        value = float(ratio[row, column])
        color = "black" if norm(max(value, 0.5)) > 0.55 else "white"
        text = f"{value:.0f}×" if value >= 9.95 else f"{value:.1f}×"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(windows)), [f"{w}×{w}" for w in windows])
    axis.set_xlabel("window around the query, in latent cells")
    axis.set_title("attention inside the window,\ntimes what uniform attention has there", size=10)


def _entropy_panel(axis, sites: list[SiteLocality]) -> None:
    seen = set()
    for row, site in enumerate(sites):
        marker, color = _KIND_MARKS[site.kind]
        reached = 100 * math.exp(site.mean("entropy")) / site.tokens
        axis.plot([0, reached], [row, row], color=color, linewidth=1.5)
        name = None if site.kind in seen else KINDS[site.kind]
        axis.plot(reached, row, marker, color=color, markersize=7, label=name, linestyle="")
        left = reached > 60
        axis.annotate(
            f"{site.mean('entropy'):.2f} of {math.log(site.tokens):.2f}",
            (reached, row),
            xytext=(-8 if left else 8, 7 if left else 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=7.5,
        )
        seen.add(site.kind)
    axis.set_xlim(0, 108)
    axis.axvline(100, color=GRAY, linewidth=0.8, linestyle=":")
    axis.set_xlabel("exp(entropy), % of all keys\nlabels: entropy of log N, in nats")
    axis.set_title("how many keys share the attention", size=10)
    _legend_below(axis)


def _sensitivity_panel(axis, sites: list[SiteLocality]) -> None:
    styles = {
        "window_error": ("o", BLUE, _window_label(sites)),
        "block_error": ("^", ORANGE, "replaced by its ΔConvBlock"),
    }
    for name, (marker, color, label) in styles.items():
        points = [
            (max(100 * sum(errors) / len(errors), 1e-6), row)
            for row, site in enumerate(sites)
            if (errors := getattr(site.sensitivity, name))
        ]
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=color, markersize=7, label=label)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axis.grid(axis="x", which="major", linewidth=0.4)
    axis.set_xlabel("squared error of the predicted noise,\nof its mean square")
    axis.set_title("what changing this layer alone costs", size=10)
    _legend_below(axis)


def _window_label(sites: list[SiteLocality]) -> str:
    """Legend of attention cut to a window."""
    windows = {s.sensitivity.window for s in sites if s.sensitivity.window}
    which = f"{min(windows)}×{min(windows)}" if len(windows) == 1 else "its kernel's window"
    return f"attention cut to {which}"


def _legend_below(axis) -> None:
    """Put the legend below the axis and its label; constrained layout makes room for it."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=8, frameon=False)


def _kernel_panel(axis, sites: list[SiteLocality], share: float) -> None:
    kernels = [site.kernel(share) for site in sites]
    axis.barh(range(len(sites)), kernels, color=BLUE, height=0.55)
    for row, (site, kernel) in enumerate(zip(sites, kernels, strict=True)):
        field = site.field(share)
        why = "no field" if field is None else f"field {field}" if field != kernel else ""
        text = f"{kernel}" + (f"  ({why})" if why else "")
        axis.text(kernel + 0.4, row, text, va="center", fontsize=8)
    axis.set_xlim(0, 27)
    axis.set_xticks([3, 7, 11, 17])
    axis.set_xlabel("cells (3 … 17)")
    axis.set_title("recommended kernel", size=10)


def plot_cost(report: LocalityReport, recipe: Recipe):
    """Computation against summed error as layers are replaced, least sensitive first."""
    curve = cost_curve(report)
    figure = new_figure(8, 4.8)
    axis = figure.subplots()
    computation = [100 * point.computation for point in curve]
    error = [100 * point.error for point in curve]
    axis.plot(computation, error, "o-", color=BLUE, markersize=5, label="least sensitive first")
    _name_steps(axis, curve, computation, error)
    errors = sensitivities(report)
    chosen = sum(errors[path] for path in recipe.replaced)
    axis.plot(
        100 * recipe_computation(report, recipe),
        100 * chosen,
        "D",
        color=ORANGE,
        markersize=9,
        label=f"this recipe: {len(recipe.replaced)} of {len(report.sites)} layers",
    )
    axis.set_xlabel("computation of self-attention and blocks, % of stock (by formula)")
    axis.set_ylabel("summed squared error of the predicted noise,\n% of its mean square")
    axis.set_title("What replacing layers saves, and what it costs", fontsize=11)
    axis.set_xlim(104, -8)
    axis.set_ylim(-0.12 * max(error), 1.12 * max(error))
    axis.grid(linewidth=0.4)
    axis.legend(loc="upper left", fontsize=8.5)
    total = sum(attention_flops(s.dim, s.height, s.width) for s in report.sites.values())
    axis.text(
        0.99,
        0.02,
        f"errors measured one layer at a time and added; stock: {total / 1e9:.3g} GFLOP",
        transform=axis.transAxes,
        ha="right",
        fontsize=7.5,
        color=GRAY,
    )
    return figure


def _name_steps(axis, curve, computation: list[float], error: list[float]) -> None:
    """Label each point with the layer it adds; points close to each other share a label."""
    names, highest = [], max(error) or 1.0
    for index, point in enumerate(curve[1:], start=1):
        names.append(plain(site_label(point.replaced[-1])))
        last = index + 1 == len(curve)
        if not last and abs(computation[index + 1] - computation[index]) < 3:
            if abs(error[index + 1] - error[index]) < 0.08 * highest:
                continue
        axis.annotate(
            ",\n".join(names),
            (computation[index], error[index]),
            xytext=(6, -4),
            textcoords="offset points",
            fontsize=7.5,
            va="top",
        )
        names = []
