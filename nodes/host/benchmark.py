"""Time steps of a MODEL at several sizes in ComfyUI's own sampling, with attention and blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...deltaconv import DeltaConvWeights
from ...deltaconv.application.step_times import (
    CONTENDERS,
    WAYS,
    Contender,
    Size,
    SizeTimes,
    latent_size,
    measure,
)
from ...deltaconv.families import native_latent
from ...deltaconv.memory import is_out_of_memory
from ...deltaconv.weights.compatibility import check_fit
from ...kernels.accuracy import Case
from ...kernels.device import device_name
from ...kernels.selftest import implementation_of
from .application import Application
from .patch import attach, compute_dtype, load_blocks, site_calls
from .sites import find_sites

# The step that is timed; every step takes the same time.
_PERCENT = 0.5


def benchmark(
    model: ModelPatcher,
    weights: DeltaConvWeights,
    sizes: Sequence[Size],
    batch: int,
    repeats: int,
    seconds: float,
) -> tuple[str, list[SizeTimes]]:
    """Time steps with attention and with ΔConvBlocks → a heading that names the device, the times.

    `sizes` are (width, height) in pixels; without any: the family's usual size and twice that. The
    MODEL is left as it was found, loaded or not.
    """
    model_sites = find_sites(model)
    check_fit(weights, model_sites.dims, model_sites.family)
    format_ = model.get_model_object("latent_format")
    cell = format_.spacial_downscale_ratio
    if not sizes:
        usual = native_latent(model_sites.family) * cell
        sizes = [(usual, usual), (2 * usual, 2 * usual)]
    latents = [latent_size(size, cell, model_sites.latent_step) for size in sizes]
    dtype = compute_dtype(model)
    application = Application(model_sites, tuple(weights.sites))
    blocks = load_blocks(weights, application.replaced, weights.gate, dtype)
    patched = attach(model, blocks, application)
    # Random: the prompt's contents do not change the time.
    prompt = [model_sites.prompt(model.model.diffusion_model)]
    bar = comfy.utils.ProgressBar(len(sizes) * 100)
    results = []
    with left_as_found(model, blocks):
        for index, (size, latent) in enumerate(zip(sizes, latents, strict=True)):

            def progress(done: int, total: int, index=index) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update_absolute(100 * index + 100 * done // total)

            steps = Steps(patched, application, SizeTimes(size), repeats, seconds, progress)
            guider = comfy.samplers.CFGGuider(patched)
            guider.inner_set_conds({"positive": prompt})
            # One frame, where latents have frames.
            frames = (1,) * (format_.latent_dimensions - 2)
            shape = (batch, format_.latent_channels, *frames, *latent)
            results.append(_at_size(guider, steps, shape))
            progress(1, 1)
    return _heading(patched, blocks, application, batch, dtype), results


def _at_size(guider, steps: "Steps", shape: tuple[int, ...]) -> SizeTimes:
    sigma = guider.model_patcher.get_model_object("model_sampling").percent_to_sigma(_PERCENT)
    try:
        noise = torch.randn(shape)
        guider.sample(noise, torch.zeros(shape), steps, torch.tensor([float(sigma)]), seed=0)
    except (RuntimeError, MemoryError) as error:
        # Weights and input alone did not fit.
        if not is_out_of_memory(error):
            raise
        left = set(CONTENDERS) - set(steps.result.times)
        steps.result.problems |= dict.fromkeys(left, "out of memory")
    comfy.model_management.soft_empty_cache()
    return steps.result


def _heading(patched, blocks, application, batch: int, dtype: torch.dtype) -> str:
    device = torch.device(patched.load_device)
    block = blocks.model[application.replaced[0]]
    case = Case(1, 8, 8, block.dim, block.kernel_size, block.scales, block.gate)
    by = implementation_of(case, dtype, device)
    # No kernel is theirs.
    by += " and pooled tokens by torch" if block.heads and by != "torch" else ""
    return (
        f"{device_name(device)}, {str(dtype).removeprefix('torch.')}, batch {batch}, torch "
        f"{torch.__version__}, blocks by {by} in "
        f"{len(application.replaced)} of {len(application.model_sites.sites)} layers"
    )


@dataclass
class Steps(comfy.samplers.Sampler):
    """Takes the sampler's place, after ComfyUI has loaded the model and the conditioning."""

    patched: ModelPatcher
    application: Application
    result: SizeTimes
    repeats: int
    seconds: float
    progress: Callable[[int, int], None]

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
        """Called by ComfyUI's guider; noise, latent_image [B, C, H, W] → the noise, timed with."""
        sampling = model_wrap.inner_model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, latent_image)
        sigma = sigmas[0] * x.new_ones(x.shape[0])
        sites = site_calls(self.patched, self.application, x.shape[0], tuple(x.shape[-2:]))

        def step() -> torch.Tensor:
            return model_wrap(x, sigma, **extra_args)

        def layers() -> torch.Tensor:
            for site in sites:
                result = site()
            return result

        def resting(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            def attend() -> torch.Tensor:
                with self.application.resting():
                    return call()

            return attend

        calls = {}
        for part, call in (("step", step), ("layers", layers)):
            # One model runs both ways, so that they can be interleaved.
            calls[Contender(part, WAYS[0])] = resting(call)
            calls[Contender(part, WAYS[1])] = call
        measure(self.result, calls, x.device, self.repeats, self.seconds, self.progress)
        return x


@contextmanager
def left_as_found(model: ModelPatcher, blocks: ModelPatcher) -> Iterator[None]:
    """Context: at its end the clone of `model` that was loaded before is loaded again, or none."""
    management = comfy.model_management

    def loaded_clones(patcher: ModelPatcher) -> list[ModelPatcher]:
        models = [entry.model for entry in management.current_loaded_models]
        return [found for found in models if found is not None and found.is_clone(patcher)]

    def unload(models: list[ModelPatcher]) -> None:
        kept = [entry for entry in management.current_loaded_models if entry.model not in models]
        for device in {found.load_device for found in models}:
            # Ask for more than there is, so that all are unloaded.
            management.free_memory(1e30, device, keep_loaded=kept)

    before = loaded_clones(model)
    try:
        yield
    finally:
        unload(loaded_clones(blocks))
        if before:
            nested = [m for found in before for m in found.get_nested_additional_models()]
            management.load_models_gpu([*before, *nested])
        else:
            unload(loaded_clones(model))
        management.soft_empty_cache()
