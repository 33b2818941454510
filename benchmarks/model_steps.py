"""Steps of one whole model: stock, with ΔConvBlocks, and with core's own alternatives.

Weights are random: time and memory of a step do not depend on them. The number of steps that
EasyCache skips does, so its row says how many were computed. Everything is warmed up before
anything is timed; then all take turns over one loaded model.
"""

from collections.abc import Callable

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import copy_nested_dicts

from ..deltaconv import DeltaConvBlock
from ..deltaconv.distillation import default_kernels
from ..deltaconv.families import FAMILIES
from ..deltaconv.memory import is_out_of_memory
from ..deltaconv.weights.model import weights_of_blocks
from ..kernels.timing import once, summary
from ..nodes.host.application import Application
from ..nodes.host.patch import attach, load_blocks
from ..nodes.host.replay import Replays, attach_replays
from ..nodes.host.sites import find_sites

STOCK, OURS, FASTER = "stock", "deltaconv", "deltaconv where faster"
# As CUDA graphs, by the node that replays model calls.
REPLAYED = ", replayed"
# Steps longer than this are measured three times only, and once.
LONG_STEP, LONGEST_STEP = 0.5, 5.0
# UNet → how often a map that HyperTile tiles may have been halved. At core's default, full
# resolution only, SDXL has no attention.
HYPERTILE_DEPTH = {"sd1": 0, "sdxl": 2}
SAMPLED_STEPS, GUIDANCE = 20, 4.0
# Width of CLIP-G's pooled output, which SDXL reads beside the text.
_POOLED = 1280

Step = Callable[[], torch.Tensor]


@torch.inference_mode()
def measure(
    family: str,
    pixels: int,
    patcher: ModelPatcher,
    dtype: torch.dtype,
    batch: int,
    repeats: int,
) -> dict:
    """One size: seconds of a step, bytes at its peak, and seconds of sampling, by variant.

    A variant whose output equals stock's has no effect; it gets a sentence instead of a time.
    """
    device = torch.device(patcher.load_device)
    step_of = _steps(pixels // 8, patcher, dtype, batch)
    entry = {
        "family": family,
        "pixels": pixels,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
    }
    entry |= {"repeats": repeats, "steps": {}, "memory": {}, "left_out": {}}
    comfy.model_management.load_models_gpu([patcher])
    variants = instead(family, patcher)
    steps = {name: step_of(found) for name, found in variants.items()}
    outputs = {}
    for name in list(steps):
        _warm_up(name, steps, outputs, entry, device)
    if STOCK in outputs:
        _leave_out_without_effect(steps, outputs, entry)
    variants = {name: found for name, found in variants.items() if name in steps}
    # Attached last, so that the blocks do not count as another variant's memory.
    variants |= with_blocks(family, patcher, dtype)
    patched = variants[OURS]
    comfy.model_management.load_models_gpu([patched, *patched.get_nested_additional_models()])
    replays = {}
    for name in (STOCK, OURS, FASTER):
        if (made := replays_for(device)) is not None:
            replays[name + REPLAYED] = made
            variants[name + REPLAYED] = attach_replays(variants[name], made)
    turn = _Turn(patched)
    for name in [name for name in variants if name not in outputs]:
        steps[name] = step_of(variants[name])
        turn.take(variants[name])
        if name in replays:
            replays[name].before_sampling(variants[name])
        _warm_up(name, steps, outputs, entry, device)
    if {STOCK, STOCK + REPLAYED} <= outputs.keys():
        entry["same_bits"] = {
            name: torch.equal(outputs[name], outputs[name + REPLAYED])
            for name in (STOCK, OURS, FASTER)
            if name in outputs and name + REPLAYED in outputs
        }
    entry |= {"steps": _in_turns(steps, variants, turn, device, repeats)}
    for name, each in replays.items():
        # A variant that was not replayed has stock's time under another's name.
        if reason := each.why_not():
            entry["left_out"][name] = f"not replayed: {reason}"
            entry["steps"].pop(name, None)
        each.after_sampling(variants[name])
    turn.take(patched)
    slow = entry["steps"].get(STOCK, {"median": float("inf")})["median"]
    if family in HYPERTILE_DEPTH:
        if slow < LONG_STEP:
            entry["sampling"] = sampling(patcher, patched, pixels // 8, batch, repeats)
        else:
            entry["left_out"]["sampling"] = f"not tried: a stock step takes {slow:.1f} s"
    patched.unpatch_model(device)
    _print(entry)
    return entry


def replays_for(device: torch.device) -> Replays | None:
    """What replays a variant's calls; None where there are no CUDA graphs."""
    return Replays() if device.type == "cuda" else None


class _Turn:
    """Whose patches are on the one loaded model; not counted in any time."""

    def __init__(self, loaded: ModelPatcher):
        self._on = loaded

    def take(self, variant: ModelPatcher) -> None:
        """Puts on the object patches of this variant."""
        if variant is not self._on:
            self._on.unpatch_model(unpatch_weights=False)
            variant.patch_model(load_weights=False)
            self._on = variant


def _steps(side: int, patcher, dtype, batch: int) -> Callable[[ModelPatcher], Step]:
    """A function from a variant to its step, all on the same random input."""
    device = patcher.load_device
    latents = patcher.model.latent_format
    # Families of video models draw one frame.
    frames = (1,) if latents.latent_dimensions == 3 else ()
    shape = (batch, latents.latent_channels, *frames, side, side)
    x = torch.randn(shape, dtype=dtype, device=device)
    context = torch.randn(batch, *_text_shape(patcher), dtype=dtype, device=device)
    arguments = {"context": context}
    if adm := patcher.model.adm_channels:
        arguments["y"] = torch.randn(batch, adm, dtype=dtype, device=device)
    times = torch.full((batch,), 500.0, device=device)

    def step_of(variant: ModelPatcher) -> Step:
        # As sampling hands them over: wrappers stand in the options.
        options = comfy.model_patcher.create_model_options_clone(variant.model_options)
        options = options["transformer_options"]
        options["wrappers"] = copy_nested_dicts(variant.wrappers)
        return lambda: variant.model.diffusion_model(
            x, times, **arguments, transformer_options=options
        )

    return step_of


def instead(family: str, patcher: ModelPatcher) -> dict[str, ModelPatcher]:
    """Stock and core's alternatives for a single step, if they load."""
    found = {STOCK: patcher}
    if family not in HYPERTILE_DEPTH:
        return found
    depth = HYPERTILE_DEPTH[family]
    try:
        from comfy_extras.nodes_hypertile import HyperTile
        from comfy_extras.nodes_tomesd import TomePatchModel

        found["tome 0.3"] = _of_node(TomePatchModel.execute(patcher, 0.3))
        tiled = HyperTile.execute(patcher, 256, 2, depth, False)
        found[f"hypertile 256, depth {depth}"] = _of_node(tiled)
    except (ImportError, AttributeError) as error:
        print(f"    core's own nodes are left out: {error}")
    return found


def with_blocks(family: str, patcher: ModelPatcher, dtype: torch.dtype) -> dict[str, ModelPatcher]:
    """Clones with random blocks at every site, which they share: always, and where faster.

    Kernels have the published sizes, or those of Distill ΔConv where nobody ships blocks.
    """
    known, model_sites = FAMILIES[family], find_sites(patcher)
    kernels = default_kernels(model_sites.levels)
    blocks = {
        site: DeltaConvBlock(dim, known.published_kernel(site) or kernels[site], gate=known.gate)
        for site, dim in model_sites.dims.items()
    }
    loaded = load_blocks(weights_of_blocks(blocks), tuple(blocks), known.gate, dtype)
    return {
        name: attach(patcher, loaded, Application(model_sites, tuple(blocks), where_faster=faster))
        for name, faster in ((OURS, False), (FASTER, True))
    }


def _warm_up(name: str, steps: dict, outputs: dict, entry: dict, device: torch.device) -> None:
    """Two calls, three of a replay: the last gives output and peak memory, the first compiles."""
    try:
        for _ in range(2 if name.endswith(REPLAYED) else 1):
            steps[name]()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        outputs[name] = steps[name]()
        if device.type == "cuda":
            entry["memory"][name] = torch.cuda.max_memory_allocated(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        entry["left_out"][name] = "out of memory"
        del steps[name]


def _leave_out_without_effect(steps: dict, outputs: dict, entry: dict) -> None:
    """Leaves out variants that differ from stock no more than two runs of stock do."""

    def apart(output: torch.Tensor) -> float:
        return (output.float() - outputs[STOCK].float()).abs().max().item()

    if not outputs[STOCK].isfinite().all():
        entry["left_out"]["check"] = "stock's output is not finite, so an effect cannot be told"
        return
    noise = apart(steps[STOCK]())
    for name in [name for name in outputs if name != STOCK and apart(outputs[name]) <= noise]:
        entry["left_out"][name] = "no effect: its output is that of stock"
        del steps[name]


def _in_turns(steps: dict, variants: dict, turn: _Turn, device, repeats: int) -> dict:
    """Name → median and quartiles in seconds; the first round is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(1 + repeats):
        slowest = max((values[0] for values in samples.values() if values), default=0.0)
        if done > (1 if slowest > LONGEST_STEP else 3 if slowest > LONG_STEP else repeats):
            break
        for name, step in steps.items():
            # Outside the timed call, so that stock runs its own forwards only.
            turn.take(variants[name])
            samples[name].append(once(step, device))
    return {name: summary(values[1:]) for name, values in samples.items()}


class _Clocked(comfy.samplers.Sampler):
    """Times a sampler, after ComfyUI has loaded the model and prepared the conditioning."""

    def __init__(self, sampler: comfy.samplers.Sampler, device: torch.device):
        self.sampler, self.device, self.seconds = sampler, device, 0.0

    def sample(self, *arguments, **options):
        result = []

        def run() -> None:
            result.append(self.sampler.sample(*arguments, **options))

        self.seconds = once(run, self.device)
        return result[0]


def sampling(stock, patched, side: int, batch: int, repeats: int) -> dict:
    """SAMPLED_STEPS guided Euler steps: stock, with core's EasyCache at its defaults, and ours.

    `computed` counts the model's calls; with a trained model EasyCache skips others.
    """
    device = torch.device(stock.load_device)
    found = {STOCK: stock, OURS: patched}
    try:
        from comfy_extras.nodes_easycache import EasyCacheNode

        inputs = [value for value in EasyCacheNode.define_schema().inputs if value.id != "model"]
        defaults = {value.id: value.default for value in inputs}
        found["easycache"] = _of_node(EasyCacheNode.execute(stock, **defaults))
    except (ImportError, AttributeError) as error:
        print(f"    EasyCache is left out: {error}")
    tokens, channels = _text_shape(stock)
    prompts = [
        [[torch.randn(1, tokens, channels), {"pooled_output": torch.randn(1, _POOLED)}]]
        for _ in range(2)
    ]
    # Guidance runs both prompts in one batch.
    shape = (max(1, batch // 2), stock.model.latent_format.latent_channels, side, side)
    noise, calls = torch.randn(shape), []
    sampler = _Clocked(comfy.samplers.sampler_object("euler"), device)
    schedule = stock.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(schedule, "normal", SAMPLED_STEPS)
    samples = {name: [] for name in found}
    hook = stock.model.diffusion_model.time_embed.register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    computed = {}
    try:
        for _ in range(1 + min(repeats, 3)):
            for name, variant in found.items():
                guider = comfy.samplers.CFGGuider(variant)
                guider.set_conds(*prompts)
                guider.set_cfg(GUIDANCE)
                calls.clear()
                latent = torch.zeros(shape)
                guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0)
                samples[name].append(sampler.seconds)
                computed[name] = len(calls)
    finally:
        hook.remove()
    timed = {
        name: summary(values[1:]) | {"computed": computed[name]} for name, values in samples.items()
    }
    return {"steps": SAMPLED_STEPS, "guidance": GUIDANCE, "sampler": "euler", "variants": timed}


def _of_node(output):
    """The MODEL of a core node's result, which is a NodeOutput or a bare tuple."""
    return getattr(output, "result", output)[0]


def _print(entry: dict) -> None:
    times = ", ".join(f"{name} {t['median'] * 1e3:.1f}" for name, t in entry["steps"].items())
    title = f"{entry['family']} at {entry['pixels']}², batch {entry['batch']}"
    print(f"{title}, ms: {times}", flush=True)
    if found := entry.get("sampling"):
        for name, timing in found["variants"].items():
            print(
                f"    {found['steps']} steps sampled, {name}: {timing['median']:.3f} s, "
                f"{timing['computed']} calls of the model",
                flush=True,
            )
    for name, reason in entry["left_out"].items():
        print(f"    {name}: {reason}", flush=True)


def _text_shape(model) -> tuple[int, int]:
    return find_sites(model).text_shape(model.model.diffusion_model)
