"""Measure self-attention, or change one site of it, through forwards patched onto a clone."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import ref

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...deltaconv.locality.attention import (
    AttentionStatistics,
    attention_of,
    measure_attention,
    windowed_attention,
)
from ...deltaconv.locality.grid import GridMaps, grid_queries
from ...deltaconv.locality.settings import LocalityPlan, query_index
from .application import Application
from .object_patches import restore_in_reverse
from .patch import compute_dtype, detach, load_blocks, original_forward
from .sites import Heads, ModelSites, Site

KEY = "deltaconv_locality"
# Bytes of one chunk of attention: for a CPU's cache, else for a GPU.
_CHUNK_BYTES = {"cpu": 2**24}
_CHUNK_ELSEWHERE = 2**27


@dataclass
class Probe:
    """What the forwards of one clone do: measure every site, or change a single one.

    While `watching`, every site's statistics are collected, and the output is the stock output.
    `changed` names the site that runs otherwise: cut to `window` or, without one, by its block.
    """

    model_sites: ModelSites
    plan: LocalityPlan
    on_site: Callable[[], None] = lambda: None
    watching: bool = False
    changed: str | None = None
    window: int | None = None
    statistics: dict[str, list[AttentionStatistics]] = field(default_factory=dict)
    maps: dict[str, torch.Tensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    # Where the attention of the interactive view's query points goes; None: not wanted.
    grid: GridMaps | None = None

    def changes(self, site: Site) -> bool:
        return self.changed == site.path

    def take(self) -> tuple[dict[str, list[AttentionStatistics]], dict[str, torch.Tensor]]:
        """What was collected since the last call: statistics and maps [P, heads, H, W] by site."""
        taken = self.statistics, self.maps
        self.statistics, self.maps = {}, {}
        return taken

    def observe(self, site: Site, q, k, height: int, width: int, scale: float | None) -> None:
        """q, k [B, heads, N, d] of one call: reduce them to statistics, or note why not."""
        interrupted = comfy.model_management.throw_exception_if_processing_interrupted
        interrupted()
        if q.shape[2] != height * width or k.shape != q.shape:
            self.leave_out(site, f"another node gave it {q.shape[2]} queries, {k.shape[2]} keys")
            return
        self.statistics.setdefault(site.path, []).append(
            measure_attention(
                q,
                k,
                height,
                width,
                scale=scale,
                queries=self.plan.queries,
                seed=self.plan.seed,
                chunk_bytes=_CHUNK_BYTES.get(q.device.type, _CHUNK_ELSEWHERE),
                between_chunks=interrupted,
            )
        )
        if self.plan.points:
            indices = [query_index(point, height, width) for point in self.plan.points]
            maps = attention_of(q[:1], k[:1], indices, scale=scale)[0]
            self.maps[site.path] = maps.transpose(0, 1).unflatten(-1, (height, width)).half().cpu()
        if self.grid is not None:
            queries = grid_queries(height, width)
            self.grid.add(attention_of(q[:1], k[:1], queries, scale=scale)[0], height, width)
        self.on_site()

    def leave_out(self, site: Site, why: str) -> None:
        """Note once why a site was not measured."""
        self.left_out.setdefault(site.path, why)

    def cut(self, q, k, v, height: int, width: int, scale: float | None) -> torch.Tensor:
        """q, k, v [B, heads, N, d] → attention over the window [B, N, heads · d]."""
        interrupted = comfy.model_management.throw_exception_if_processing_interrupted
        out = windowed_attention(
            q, k, v, height, width, self.window, scale=scale, between_rows=interrupted
        )
        return out.transpose(1, 2).flatten(2)


def probed(
    model: ModelPatcher, model_sites: ModelSites, probe: Probe, weights=None
) -> ModelPatcher:
    """A clone of `model`, without ΔConvBlocks in effect, whose sites do what `probe` says.

    Blocks of `weights` are attached for their sites to run when the probe asks for them.
    """
    clone = detach(model)
    restore_in_reverse(clone)
    blocks = None
    if weights is not None:
        patcher = load_blocks(weights, weights.sites, weights.gate, compute_dtype(model))
        clone.set_additional_models(KEY, [patcher])
        blocks = patcher.model
    model_sites.prepare(clone, KEY)
    for path, site in model_sites.sites.items():
        original, _ = original_forward(clone, site.forward_key)
        module = comfy.utils.get_attr(clone.model, f"diffusion_model.{path}")
        inspect = functools.partial(_inspect, site, probe)
        inspected = model_sites.inspecting(site, module, original, inspect)
        replaced = None
        if blocks is not None and path in weights.sites:
            on_map = Application(model_sites, (path,)).replacing(site, ref(blocks[path]))
            replaced = model_sites.wrap(site, original, on_map)
        clone.add_object_patch(
            site.forward_key, _chosen(site, probe, original, inspected, replaced)
        )
    return clone


def _chosen(
    site: Site, probe: Probe, original: Callable, inspected: Callable, replaced: Callable | None
) -> Callable:
    """A site's forward, which asks the probe at every call what to do."""

    def forward(x, *arguments, **named):
        changes = probe.changes(site)
        if changes and probe.window is None:
            return replaced(x, *arguments, **named)
        way = inspected if changes or probe.watching else original
        return way(x, *arguments, **named)

    return forward


def _inspect(site: Site, probe: Probe, heads: Heads) -> torch.Tensor | None:
    """See `Inspect`: the result [B, N, heads · d] of a cut window, or None after observing."""
    q, k, v, (height, width), scale, problem = heads
    if not problem and probe.changes(site) and q.shape[2] == height * width:
        return probe.cut(q, k, v, height, width, scale)
    if probe.watching and problem:
        probe.leave_out(site, problem)
    elif probe.watching:
        probe.observe(site, q, k, height, width, scale)
    return None
