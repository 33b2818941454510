"""Measure what keeping attention in some layers and steps costs and brings, and choose."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...deltaconv import DeltaConvWeights
from ...deltaconv.application.fastest import measure
from ...deltaconv.distillation.choice import (
    SHARES,
    ChoicePoint,
    SiteCost,
    TradeOff,
    choose,
    share_wanted,
)
from ...deltaconv.distillation.choice_plot import Sampled
from ...deltaconv.distillation.choice_report import ChoiceFacts
from ...deltaconv.distillation.choice_search import trade_off
from ...deltaconv.distillation.measure import GuidedPath, guided_path
from ...deltaconv.flops import attention_flops, block_flops
from ...deltaconv.weights.compatibility import check_fit
from ...kernels.device import device_name
from ...kernels.timing import SAMPLE_SECONDS, interleaved, once
from .application import Application
from .benchmark import left_as_found
from .patch import attach, compute_dtype, load_blocks, site_calls
from .sites import find_sites
from .teacher import ComfyTeacher

# Seconds for timing all layers; each is timed at least once.
_BUDGET = 20.0
_REPEATS = 9
# Prompts whose pictures are shown.
_MOST_PICTURES = 2
# Share of the progress bar for the model's own sampling.
_PATH = 0.05

Size = tuple[int, int]


@dataclass(frozen=True)
class Request:
    """What the user asks for: `wanted` is a preset or a share of the time, `size` in latent cells.

    `unconditional` None leaves guidance out.
    """

    conditions: Sequence
    unconditional: object | None
    wanted: str | float
    name: str
    size: Size
    cfg: float
    steps: int
    seed: int

    @property
    def rows(self) -> int:
        """Images in one model call that draws a single picture."""
        return 1 if self.unconditional is None else 2


def choose_layers(
    model: ModelPatcher,
    weights: DeltaConvWeights,
    request: Request,
    decode: Callable[[torch.Tensor], torch.Tensor | None],
) -> tuple[ChoiceFacts, list[Sampled]]:
    """Time every layer, measure sets of them along the model's sampling, choose → facts, pictures.

    `decode` makes pictures [B, H, W, 3] of latents [B, C, H, W], or None: no pictures then. Called
    outside inference mode. Raises ValueError where weights do not fit or nothing can be chosen.
    """
    share_wanted(request.wanted)
    sites = find_sites(model)
    check_fit(weights, sites.dims, sites.family)
    teacher = ComfyTeacher(model)
    costs, counted = site_costs(model, weights, request.size, request.rows)
    bar = comfy.utils.ProgressBar(1000)
    run = _Run(teacher, weights, request, lambda share: bar.update_absolute(round(1000 * share)))
    with teacher:
        path = run.path()
        measured = run.trade_off(path, costs)
        named = named_points(measured, request)
    bar.update_absolute(1000)
    steps, prompts = len(path.points), len(request.conditions)
    guidance = "no guidance" if path.cfg == 1 else f"CFG {path.cfg:g}"
    facts = ChoiceFacts(
        measured,
        named,
        request.name,
        tuple(teacher.dims),
        counted,
        f"{prompts} prompt{'s' * (prompts > 1)}, {steps} step{'s' * (steps > 1)}, {guidance}, seed "
        f"{request.seed}",
    )
    return facts, _decoded(teacher, path, measured, named, decode)


def named_points(measured: TradeOff, request: Request) -> dict[str, ChoicePoint]:
    """Name → point: what is asked for, and the presets that can be had."""
    named = {request.name: choose(measured, request.wanted)}
    for preset in SHARES:
        try:
            named.setdefault(preset, choose(measured, preset))
        except ValueError:
            # Weights that act late cannot save as much.
            continue
    return dict(sorted(named.items(), key=lambda entry: entry[1].saved))


def site_costs(
    model: ModelPatcher, weights: DeltaConvWeights, size: Size, batch: int
) -> tuple[dict[str, SiteCost], str]:
    """Seconds of attention and block of each layer on this device, and how they were taken.

    By formula where a layer runs out of memory. The MODEL is left as it was found.
    """
    application = Application(find_sites(model), tuple(weights.sites))
    dtype = compute_dtype(model)
    blocks = load_blocks(weights, application.replaced, weights.gate, dtype)
    patched = attach(model, blocks, application)
    with left_as_found(model, blocks):
        loaded = [patched, *patched.get_nested_additional_models()]
        comfy.model_management.load_models_gpu(loaded)
        costs = _timed(patched, application, weights, batch, size)
    where = f"at {size[1]} × {size[0]} latent cells"
    if all(math.isfinite(cost.attention + cost.block) for cost in costs.values()):
        device = device_name(torch.device(patched.load_device))
        name = str(dtype).removeprefix("torch.")
        return costs, f"timed on {device} {where}, {name}, batch {batch}"
    map_size = application.model_sites.map_size
    costs = {
        site: SiteCost(
            attention_flops(geometry.dim, *map_size(site, *size)),
            block_flops(geometry, weights.scales[site], *map_size(site, *size)),
            timed=False,
        )
        for site, geometry in weights.sites.items()
    }
    return costs, f"by formula {where}, as a layer alone ran out of memory when it was timed"


def _timed(
    patched: ModelPatcher,
    application: Application,
    weights: DeltaConvWeights,
    batch: int,
    size: Size,
) -> dict[str, SiteCost]:
    """Medians of both ways in turns, once for all layers that are alike; inf: out of memory."""
    device = torch.device(patched.load_device)
    sites, known = application.model_sites, {}
    calls = dict(
        zip(application.replaced, site_calls(patched, application, batch, size), strict=True)
    )
    alike = {
        site: (
            geometry,
            weights.scales[site],
            sites.sites[site].parameters,
            *sites.map_size(site, *size),
        )
        for site, geometry in weights.sites.items()
    }
    seconds = _BUDGET / len(set(alike.values()))
    for site, call in calls.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        if alike[site] not in known:

            def attend(call=call):
                with application.resting():
                    return call()

            known[alike[site]] = _cost(call, attend, device, seconds)
    return {site: known[alike[site]] for site in calls}


def _cost(block: Callable, attention: Callable, device: torch.device, seconds: float) -> SiteCost:
    choice, spent = measure(device, block, attention, seconds)
    cost = SiteCost(choice.attention, choice.block)
    if spent + cost.attention < seconds and math.isfinite(cost.block):
        # What decided may have been a first call, which takes several times as long.
        again = once(attention, device)
        spent += again
        cost = SiteCost(min(cost.attention, again), cost.block)
    per_repeat = sum(max(way, SAMPLE_SECONDS) for way in (cost.attention, cost.block))
    repeats = min(_REPEATS, int((seconds - spent) / per_repeat) - 2)
    if repeats < 3:
        return cost
    times = interleaved({"attention": attention, "block": block}, device, repeats)
    return SiteCost(*(times[way]["median"] for way in ("attention", "block")))


@dataclass
class _Run:
    """What is sampled within the loaded teacher; `show` hears the share that is done."""

    teacher: ComfyTeacher
    weights: DeltaConvWeights
    request: Request
    show: Callable[[float], None]

    def __post_init__(self):
        self.blocks = {
            site: block.to(self.teacher.device).eval()
            for site, block in self.weights.blocks().items()
        }

    @property
    def _conditions(self) -> tuple[list, object]:
        conditions, empty = self.request.conditions, self.request.unconditional
        return list(conditions), conditions[0] if empty is None else empty

    @property
    def _noise(self) -> torch.Tensor:
        channels = self.teacher.patcher.model.latent_format.latent_channels
        shape, seed = (channels, *self.request.size), self.request.seed
        # One generator per picture: it does not depend on how many there are.
        return torch.stack(
            [
                torch.randn(shape, generator=torch.Generator().manual_seed((seed + row) % 2**63))
                for row in range(len(self.request.conditions))
            ]
        )

    def path(self) -> GuidedPath:
        """The model's own sampling of every prompt."""
        steps, request = self.request.steps, self.request
        return guided_path(
            self.teacher,
            *self._conditions,
            self._noise,
            steps=steps,
            cfg=1.0 if request.unconditional is None else request.cfg,
            progress=lambda step: self.show(_PATH * step / steps),
        )

    def trade_off(self, path: GuidedPath, costs: Mapping[str, SiteCost]) -> TradeOff:
        """Layers and steps tried, down to the least that is asked for."""

        def progress(done: int, most: int) -> None:
            self.show(_PATH + (1 - _PATH) * done / most)

        return trade_off(
            path,
            self.teacher,
            self.blocks,
            costs,
            wanted=share_wanted(self.request.wanted),
            earliest=self.weights.start,
            progress=progress,
        )


def _decoded(
    teacher: ComfyTeacher,
    path: GuidedPath,
    measured: TradeOff,
    named: Mapping[str, ChoicePoint],
    decode: Callable[[torch.Tensor], torch.Tensor | None],
) -> list[Sampled]:
    """Pictures of the first prompts, with attention and with every choice; [] without a decoder."""
    choices = [("attention", None, path.latents)]
    choices += [(name, point, measured.latents[point]) for name, point in named.items()]
    sampled = []
    for name, point, latents in choices:
        pictures = decode(teacher.latents_out(latents[:_MOST_PICTURES].cpu()))
        if pictures is None:
            return []
        sampled.append(Sampled(name, point, pictures))
    return sampled
