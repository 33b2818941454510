"""Plots of a locality report by layer: radial profiles, and the attention of query points."""

import math
from collections.abc import Iterable

import torch

from ..families import family_title
from ..pictures.figure import BLUE, GRAY, GREEN, ORANGE, new_figure, picture, plain
from .attention import uniform_offsets
from .decomposition import decompose
from .profile import ring_distances, ring_mass
from .report import LocalityReport, SiteLocality, site_label

# Of the attention maps over the picture.
_OPACITY = 0.8


def plot_profiles(report: LocalityReport):
    """Weight on a key against its distance, log axes, with the fitted curve, a panel per layer."""
    groups = _groups(report.sites.values())
    columns = min(5, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = new_figure(3.1 * columns + 0.4, 2.6 * rows + 1.2)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    low, high = 1.0, 1.0
    for axis, (name, sites) in zip(axes, groups.items(), strict=False):
        distances, relative, pairs, fit = _mean_profile(sites)
        tokens = sites[0].tokens
        axis.axhline(1, color=GRAY, linestyle=":", linewidth=1, label="uniform attention")
        for few in (False, True):
            # Rings of few pairs are noisy, except the query's own cell and its neighbors.
            shown = (relative > 0) & ((pairs * tokens < 0.5) & (distances > 1) == few)
            axis.plot(
                distances[shown],
                relative[shown],
                ".",
                color=BLUE,
                markersize=4,
                alpha=0.3 if few else 1,
                label=None if few else "measured (pale: few keys are that far)",
            )
        along = torch.cat([torch.linspace(0, 1, 20), torch.logspace(0, 2, 200)])
        along = along[along <= float(distances.max())]
        curve = fit.weight(along) * tokens
        axis.plot(along, curve, color=ORANGE, linewidth=1.6, label="fit a/(d² + c) + b")
        constant = fit.b * tokens
        if constant > 0:
            axis.axhline(constant, color=GREEN, linewidth=1, linestyle="--", label="its constant b")
        axis.set_title(f"{plain(name)}   {sites[0].width}×{sites[0].height}", fontsize=10)
        axis.text(
            0.97,
            0.95,
            f"local {100 * fit.local_share:.0f}%\nconstant {100 * fit.constant_share:.0f}%\n"
            f"R² {fit.r2:.2f}",
            transform=axis.transAxes,
            ha="right",
            va="top",
            fontsize=8.5,
        )
        values = relative[(relative > 0) & (pairs * tokens >= 0.5)].tolist() or [1.0]
        low, high = min(low, *values), max(high, *values, float(relative[0]))
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    farthest = 1.5 * max(max(s.height, s.width) for s in report.sites.values())
    # Linear below one cell, so that the query's own cell at 0 is on the axis.
    axes[0].set_xscale("symlog", linthresh=1, linscale=0.5, base=2)
    axes[0].set_yscale("log")
    axes[0].set_ylim(max(low / 1.5, 1e-3), high * 2)
    axes[0].set_xlim(-0.1, farthest)
    marks = [0, *(2**n for n in range(9) if 2**n <= farthest)]
    axes[0].set_xticks(marks, [str(mark) for mark in marks])
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes[0].minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    for axis in axes[len(groups) - columns : len(groups)]:
        axis.set_xlabel("distance, in latent cells")
        axis.tick_params(labelbottom=True)
    figure.supylabel("attention on a key at that distance, times uniform's", fontsize=10)
    figure.suptitle(
        f"How the self-attention of {plain(family_title(report.family))} falls off with distance "
        "between query and key, mean over queries, heads and sigmas",
        fontsize=11,
    )
    return figure


def _groups(sites: Iterable[SiteLocality]) -> dict[str, list[SiteLocality]]:
    """Sites by label, those of one transformer together."""
    groups: dict[str, list[SiteLocality]] = {}
    for site in sites:
        groups.setdefault(site_label(site.path).partition("/")[0], []).append(site)
    return groups


def _mean_profile(sites: list[SiteLocality]):
    """Distances, mean weight over uniform, keys per query over N, and the fit of several sites."""
    height, width = sites[0].height, sites[0].width
    same = [site for site in sites if (site.height, site.width) == (height, width)]
    relative = torch.tensor([s.profile[1] for s in same], dtype=torch.float64).mean(dim=0)
    distances, _ = ring_distances(2 * height - 1, 2 * width - 1)
    pairs = ring_mass(uniform_offsets(height, width))
    fit = decompose(relative * pairs, pairs, distances, height, width)
    return distances, relative, pairs, fit


def plot_points(report: LocalityReport, index: int):
    """Attention of the query points at one sigma: the picture, then each size of map over it."""
    by_size: dict[tuple[int, int], list[torch.Tensor]] = {}
    for maps in report.maps.values():
        height, width = maps.shape[-2:]
        by_size.setdefault((height, width), []).append(maps[index].float().mean(dim=1))
    sizes = sorted(by_size, reverse=True)
    seen = report.pictures[index] if index < len(report.pictures) else torch.ones(8, 8, 3)
    rows, columns = len(report.points), 1 + len(sizes)
    figure = new_figure(3.0 * columns + 0.9, 2.95 * rows + 0.9)
    # After new_figure, which raises PlotsUnavailable without matplotlib.
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    axes = figure.subplots(rows, columns, squeeze=False)
    aspect = seen.shape[0] / seen.shape[1]
    extent = (0, 1, aspect, 0)
    gray = seen.mean(dim=-1).clamp(0, 1)
    norm = LogNorm(0.3, 30)
    for row, (x, y) in enumerate(report.points):
        axes[row, 0].imshow(seen.clamp(0, 1).numpy(), extent=extent, interpolation="nearest")
        axes[row, 0].set_ylabel(f"query at ({x:.2f}, {y:.2f})", fontsize=9)
        for column, size in enumerate(sizes, start=1):
            axis = axes[row, column]
            weight = torch.stack(by_size[size]).mean(dim=0)[row] * size[0] * size[1]
            axis.imshow(0.55 + 0.45 * gray.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
            axis.imshow(
                weight.clamp(0.3, 30).numpy(),
                norm=norm,
                cmap="viridis",
                extent=extent,
                alpha=_OPACITY,
                interpolation="nearest",
            )
            _scale_bar(axis, size, aspect, right=x < 0.5 and y > 0.75)
            count = len(by_size[size])
            layers = "1 layer" if count == 1 else f"mean of {count} layers"
            if row == 0:
                axis.set_title(f"map {size[1]}×{size[0]}, {layers}", fontsize=10)
        for axis in axes[row]:
            axis.plot(x, y * aspect, "o", mfc="none", mec="white", markersize=11, mew=3)
            axis.plot(x, y * aspect, "o", mfc="none", mec=ORANGE, markersize=11, mew=1.6)
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0, 0].set_title("the picture at that step", fontsize=10)
    scale = ScalarMappable(norm, "viridis")
    place = {"fraction": 0.03, "pad": 0.01}
    bar = figure.colorbar(scale, ax=axes[:, 1:], extend="both", alpha=_OPACITY, **place)
    bar.set_ticks([0.3, 1, 3, 10, 30], labels=["0.3×", "1×", "3×", "10×", "30×"])
    bar.set_label("attention on a key, times uniform's")
    figure.suptitle(
        f"What the marked point looks at, {100 * report.percents[index]:.0f}% into sampling "
        f"(sigma {report.sigmas[index]:.2f}), mean over heads and layers",
        fontsize=11,
    )
    return figure


def plot_every_step(report: LocalityReport) -> torch.Tensor:
    """`plot_points` at every sigma, or one picture of the reason why not → [S, H, W, 3]."""

    def draw(index: int):
        if not report.maps:
            raise ValueError("No query points were given, so there is no attention to draw here.")
        return plot_points(report, index)

    steps = range(len(report.sigmas) if report.maps else 1)
    return torch.cat([picture(lambda index=index: draw(index), ValueError) for index in steps])


def _scale_bar(axis, size: tuple[int, int], aspect: float, right: bool) -> None:
    """Draw a labelled bar of 2, 4, 8 … cells, about a quarter of the map."""
    cells = 2 ** max(0, round(math.log2(size[1] / 4)))
    length, bottom = cells / size[1], aspect * 0.95
    left = 0.95 - length if right else 0.05
    for width, color in ((5.5, "black"), (2.5, "white")):
        axis.plot([left, left + length], [bottom] * 2, color=color, linewidth=width)
    axis.text(
        left,
        bottom - 0.03 * aspect,
        f"{cells} cells",
        fontsize=8,
        va="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85},
    )
