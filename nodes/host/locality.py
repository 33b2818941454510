"""One locality run: ComfyUI's own sampling calls the model once per sigma and change."""

from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...deltaconv.families import native_latent
from ...deltaconv.locality.grid import GridMaps
from ...deltaconv.locality.report import LocalityReport, Sensitivity, SiteLocality, measure_site
from ...deltaconv.locality.settings import LocalityPlan
from ...deltaconv.weights.compatibility import check_fit
from .probe import Probe, probed
from .sites import find_sites

# Steps of the model's own samples, beside the measured ones.
_STEPS = 16


def measure_locality(
    model: ModelPatcher, positive, latent: torch.Tensor | None, plan: LocalityPlan, weights=None
) -> LocalityReport:
    """Run `model` on noisy latents [B, C, H, W] at the plan's percents → LocalityReport.

    Without a latent, or with an empty one, the model's own samples at those sigmas are taken,
    drawn from `positive` alone. `weights` are the ΔConvBlocks whose sensitivity is wanted.
    """
    model_sites = find_sites(model)
    wants_block, wants_window = "block" in plan.sensitivity, "window" in plan.sensitivity
    if wants_block:
        if weights is None:
            raise ValueError(
                f"Expected ΔConv weights for sensitivity {plan.sensitivity!r}, got none. Connect "
                "them to deltaconv, or measure the window alone."
            )
        check_fit(weights, model_sites.dims, model_sites.family)
    format_ = model.get_model_object("latent_format")
    if latent is None:
        side = native_latent(model_sites.family)
        latent = torch.zeros(1, format_.latent_channels, side, side)
    own = not latent.count_nonzero()
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    percents = _sigmas(model, plan.percents)
    sigmas = list(percents)
    run = LocalityRun(
        Probe(model_sites, plan),
        sigmas,
        own,
        wants_window,
        tuple(weights.sites) if wants_block else (),
    )
    schedule = run.schedule(model)
    calls = len(sigmas) * (wants_window * len(model_sites.sites) + len(run.blocks))
    measured = len(sigmas) * len(model_sites.sites)
    run.bar = comfy.utils.ProgressBar(len(schedule) - len(sigmas) + measured + calls)
    run.probe.on_site = lambda: run.bar.update(1)
    clone = probed(model, model_sites, run.probe, weights if wants_block else None)
    noise = comfy.sample.prepare_noise(latent, plan.seed)
    guider = comfy.samplers.CFGGuider(clone)
    guider.inner_set_conds({"positive": positive})
    try:
        guider.sample(noise, latent, run, schedule, disable_pbar=True, seed=plan.seed)
    finally:
        # Free the rest: the forwards stay on the model until the next clone is loaded.
        run.probe.on_site = lambda: None
        run.probe.take()
    points = len(sigmas)
    return LocalityReport(
        model_sites.family,
        tuple(latent.shape[-2:]),
        sigmas,
        list(percents.values()),
        run.sites,
        plan.share,
        plan.queries,
        list(plan.points),
        {path: torch.stack(maps) for path, maps in run.maps.items() if len(maps) == points},
        [_picture(x0, format_) for x0 in run.denoised],
        run.probe.left_out,
        "the model's own samples" if own else "the given latents with noise",
        run.grid,
    )


@dataclass
class LocalityRun(comfy.samplers.Sampler):
    """Takes the sampler's place, after ComfyUI has loaded the model and the conditioning."""

    probe: Probe
    sigmas: list[float]
    own: bool
    windows: bool
    blocks: tuple[str, ...]
    bar: comfy.utils.ProgressBar | None = None
    # For the interactive view: attention at the middle one of the sigmas.
    grid: GridMaps = field(default_factory=GridMaps)
    sites: dict[str, SiteLocality] = field(default_factory=dict)
    maps: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    denoised: list[torch.Tensor] = field(default_factory=list)

    def schedule(self, model: ModelPatcher) -> torch.Tensor:
        """Sigmas to step through, falling: the measured ones and, for own samples, more between."""
        if not self.own:
            return torch.tensor(self.sigmas)
        sampling = model.get_model_object("model_sampling")
        steps = comfy.samplers.calculate_sigmas(sampling, "normal", _STEPS)
        between = [float(s) for s in steps if s > self.sigmas[-1]]
        return torch.tensor(sorted({*between, *self.sigmas}, reverse=True))

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ):
        """Called by ComfyUI's guider; noise, latent_image [B, C, H, W] → the last x."""

        def predict(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return model_wrap(x, sigma * x.new_ones(x.shape[0]), **extra_args)

        seen = []
        sampling = model_wrap.inner_model.model_sampling
        full = self.max_denoise(model_wrap, sigmas) and self.own
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, full)
        for index, sigma in enumerate(sigmas):
            if not self.own:
                x = sampling.noise_scaling(sigma, noise, latent_image)
            if float(sigma) in self.sigmas:
                denoised = self._watch(predict, x, sigma)
                seen.append((x, sigma, denoised))
            else:
                denoised = predict(x, sigma)
                self.bar.update(1)
            if self.own and index + 1 < len(sigmas):
                x = x + (x - denoised) / sigma * (sigmas[index + 1] - sigma)
        if not self.sites:
            reasons = "; ".join(sorted(set(self.probe.left_out.values()))) or "no layer ran"
            raise ValueError(
                f"Expected at least one layer to measure, got none: {reasons}. Take the nodes that "
                "change self-attention off the model."
            )
        self._try_changes(predict, seen)
        return x

    def _watch(self, predict: Callable, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """One stock call of the model that is measured at every site."""
        self.probe.watching = True
        if float(sigma) == self.sigmas[len(self.sigmas) // 2]:
            self.probe.grid = self.grid
        try:
            denoised = predict(x, sigma)
        finally:
            self.probe.watching, self.probe.grid = False, None
        self.denoised.append(denoised[:1].float().cpu())
        statistics, maps = self.probe.take()
        for path, site in self.probe.model_sites.sites.items():
            calls = statistics.get(path)
            if not calls:
                self.probe.leave_out(site, "its attention did not run; another node replaces it")
            if path in self.probe.left_out:
                self.sites.pop(path, None)
                continue
            height, width = calls[0].height, calls[0].width
            calls = [c for c in calls if (c.height, c.width) == (height, width)]
            found = self.sites.setdefault(
                path, SiteLocality(path, site.level, site.dim, height, width, [])
            )
            found.measurements.append(measure_site(calls, float(sigma)))
            if path in maps:
                self.maps.setdefault(path, []).append(maps[path])
        return denoised

    def _try_changes(self, predict: Callable, seen: list) -> None:
        """Call the model again with one site changed, for every site, change and sigma."""
        plan = self.probe.plan
        for path, site in self.sites.items():
            window = plan.window or site.kernel(plan.share)
            by_window = [self._change(predict, path, window, *s) for s in seen * self.windows]
            has_block = path in self.blocks
            by_block = [self._change(predict, path, None, *s) for s in seen * has_block]
            if by_window or by_block:
                site.sensitivity = Sensitivity(
                    window if by_window else None, by_window or None, by_block or None
                )

    def _change(self, predict: Callable, path: str, window: int | None, x, sigma, stock) -> float:
        """Relative squared error of ε̂ ∝ x − denoised with one site changed."""
        self.probe.changed, self.probe.window = path, window
        try:
            changed = predict(x, sigma)
        finally:
            self.probe.changed = None
            self.bar.update(1)
        return float((changed - stock).square().mean() / (x - stock).square().mean())


def _sigmas(model: ModelPatcher, percents) -> dict[float, float]:
    """Percents of sampling → sigma: percent, the sigmas kept within what the model was trained for.

    Percents that share a sigma are measured once.
    """
    sampling = model.get_model_object("model_sampling")
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    by_sigma: dict[float, float] = {}
    for percent in percents:
        sigma = min(max(float(sampling.percent_to_sigma(percent)), low), high)
        # Round to float32, as the sampler does.
        by_sigma.setdefault(float(torch.tensor(sigma)), percent)
    return by_sigma


def _picture(denoised: torch.Tensor, format_) -> torch.Tensor:
    """Latent [1, C, H, W] → rough picture [H, W, 3] in 0…1 by the format's own preview factors.

    Of a latent [1, C, T, H, W] the first frame.
    """
    x = denoised[:, :, 0] if denoised.ndim == 5 else denoised
    if (reshape := getattr(format_, "latent_rgb_factors_reshape", None)) is not None:
        x = reshape(x)
    x = x[0].movedim(0, -1)
    if (factors := getattr(format_, "latent_rgb_factors", None)) is None:
        x = x.mean(dim=-1, keepdim=True).expand(-1, -1, 3)
        return ((x - x.min()) / (x.max() - x.min()).clamp_min(1e-6)).clone()
    bias = getattr(format_, "latent_rgb_factors_bias", None)
    rgb = x @ torch.tensor(factors, dtype=x.dtype)
    if bias is not None:
        rgb = rgb + torch.tensor(bias, dtype=x.dtype)
    return ((rgb + 1) / 2).clamp(0, 1)
