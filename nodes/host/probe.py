"""Watching and changing self-attention, one site at a time, through forwards put on a clone."""

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
from .forward import Block, pixart_forward, unet_forward
from .object_patches import restore_in_reverse
from .patch import compute_dtype, detach, load_blocks, original_forward
from .sites import ModelSites, Site

KEY = "deltaconv_locality"
# One chunk of attention; the GPU likes larger ones than a CPU's cache.
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
    for path, site in model_sites.sites.items():
        original, _ = original_forward(clone, site.forward_key)
        block = ref(blocks[path]) if blocks is not None and path in weights.sites else None
        application = Application(model_sites, (path,))
        if model_sites.patch_size is None:
            forward = _unet_probe(site, original, probe, block, application)
        else:
            module = comfy.utils.get_attr(clone.model, f"diffusion_model.{path}")
            forward = _pixart_probe(site, module, original, probe, block, application)
        clone.add_object_patch(site.forward_key, forward)
    return clone


def _unet_probe(
    site: Site,
    original: Callable,
    probe: Probe,
    block: Block | None,
    application: Application,
) -> Callable:
    """Forward of a UNet's attn1 that lets the probe see q and k where attention is computed."""
    replaced = None if block is None else unet_forward(site, block, original, application)

    def forward(x, context=None, value=None, mask=None, transformer_options=None):
        options = {} if transformer_options is None else transformer_options
        changes = probe.changes(site)
        if changes and probe.window is None:
            return replaced(x, context, value, mask, options)
        if changes or probe.watching:
            # The override reaches this attention alone: attn2 gets the options without it.
            own = functools.partial(_attend, site, probe, options, mask is not None)
            options = {**options, "optimized_attention_override": own}
        return original(x, context=context, value=value, mask=mask, transformer_options=options)

    return forward


def _attend(site: Site, probe: Probe, options, masked, function, q, k, v, heads, *args, **kwargs):
    """Stands where attention is computed; q, k, v [B, N, heads · d] as the host gives them."""
    size = tuple(options.get("activations_shape", (0, 0, 0, 0))[-2:])
    scale = kwargs.get("scale")
    plain = not masked and not kwargs.get("skip_reshape") and q.shape == k.shape
    if probe.changes(site) and plain and q.shape[1] == size[0] * size[1]:
        split = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
        return probe.cut(*split, *size, scale)
    if probe.watching and not plain:
        probe.leave_out(site, "another node gave it a mask, or keys of its own")
    elif probe.watching:
        split = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k))
        probe.observe(site, *split, *size, scale)
    if (earlier := options.get("optimized_attention_override")) is not None:
        return earlier(function, q, k, v, heads, *args, **kwargs)
    return function(q, k, v, heads, *args, **kwargs)


def _pixart_probe(
    site: Site,
    module: torch.nn.Module,
    original: Callable,
    probe: Probe,
    block: Block | None,
    application: Application,
) -> Callable:
    """Forward of PixArt's attn; it gets no transformer_options, so q and k are computed again."""
    patch_size = application.model_sites.patch_size
    replaced = (
        None if block is None else pixart_forward(site, block, original, application, patch_size)
    )

    def forward(x, mask=None, HW=None, block_id=None):
        changes = probe.changes(site)
        if changes and probe.window is None:
            return replaced(x, mask, HW, block_id)
        if (changes or probe.watching) and getattr(module, "sr_ratio", 1) > 1:
            probe.leave_out(site, "it compresses its keys, so they are not cells of this map")
        elif changes or probe.watching:
            side = round(x.shape[1] ** 0.5)
            height, width = (size // patch_size for size in HW) if HW else (side, side)
            q, k, v = module.qkv(x).unflatten(-1, (3, -1)).unbind(2)
            heads = (module.q_norm(q), module.k_norm(k), v)
            q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in heads)
            if changes:
                return module.proj(probe.cut(q, k, v, height, width, None))
            probe.observe(site, q, k, height, width, None)
        return original(x, mask=mask, HW=HW, block_id=block_id)

    return forward
