"""Put ΔConvBlocks in place of self-attention: object patches on a clone, nothing else.

Only the forward of each site is replaced, through the patcher, so that unpatching restores the
model bit for bit. The blocks live in a ModelPatcher of their own, attached to the clone, so that
ComfyUI loads, counts and unloads them.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import ReferenceType, ref

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...deltaconv import DeltaConvBlock, DeltaConvWeights
from .application import Application
from .object_patches import restore_in_order, restore_in_reverse, stock_forward
from .ops import LendingCast
from .taken_weights import say_what_is_taken, take_silently

KEY = "deltaconv"

# Clones for several GPUs get their blocks only after ON_CLONE; 0.18 has no such event.
CLONE_EVENTS = [
    getattr(CallbacksMP, event)
    for event in ("ON_CLONE", "ON_DEEPCLONE_MULTIGPU")
    if hasattr(CallbacksMP, event)
]


class DeltaConvBlocks(torch.nn.Module):
    """All blocks of one application, by site path."""

    def __init__(self, blocks: dict[str, DeltaConvBlock]):
        super().__init__()
        self.sites = tuple(blocks)
        self.blocks = torch.nn.ModuleList(blocks.values())

    def __getitem__(self, site: str) -> DeltaConvBlock:
        return self.blocks[self.sites.index(site)]


@dataclass(frozen=True)
class Binding:
    """What a patched forward is bound to; a clone with another model or blocks needs its own."""

    model: ReferenceType[torch.nn.Module]
    blocks: ReferenceType[DeltaConvBlocks]
    original: Callable
    # Whether `original` is another node's object patch and not the model's own.
    chained: bool


def load_blocks(weights: DeltaConvWeights, sites: Iterable[str], gate: str | None, dtype):
    """A ModelPatcher that holds the blocks of `sites`, in ComfyUI's casting operations.

    Weights wider than the model's compute `dtype` are narrowed to it; narrower ones stay.
    """
    blocks = {}
    for site in sites:
        block = weights.block(site, gate=gate, operations=LendingCast)
        if dtype is not None and next(block.parameters()).dtype.itemsize > dtype.itemsize:
            block.to(dtype)
        blocks[site] = block.requires_grad_(False).eval()
    module = DeltaConvBlocks(blocks)
    comfy.model_management.archive_model_dtypes(module)
    patcher = comfy.model_patcher.CoreModelPatcher(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.cached_patcher_init = (
        functools.partial(_load_blocks_again, weights, tuple(sites), gate, dtype),
        (),
    )
    return patcher


def _load_blocks_again(weights, sites, gate, dtype, disable_dynamic=False):
    """New blocks, for a device or a clone that cannot share the first ones."""
    return load_blocks(weights, sites, gate, dtype)


def compute_dtype(model: comfy.model_patcher.ModelPatcher) -> torch.dtype:
    """dtype of the model's activations, whatever its weights are stored in."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def attach(
    model: comfy.model_patcher.ModelPatcher,
    blocks: comfy.model_patcher.ModelPatcher,
    application: Application,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` whose sites run `blocks`, in place of any earlier application."""
    patched = detach(model)
    patched.set_additional_models(KEY, [blocks])
    patched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, application.before_sampling)
    patched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, _let_gradients_pass)
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, application.after_sampling)
    rebind = functools.partial(_rebind, application)
    for event in CLONE_EVENTS:
        patched.add_callback_with_key(event, KEY, rebind)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, application.around_sampling)
    if application.percent_range is not None:
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, application.around_model_call)
    application.model_sites.prepare(patched, KEY)
    restore_in_reverse(patched)
    say_what_is_taken(patched, application.say_on_running)
    _bind(patched, application, application.replaced)
    return patched


def choose_ways(
    patched: comfy.model_patcher.ModelPatcher,
    application: Application,
    batch: int,
    latent_size: tuple[int, int],
) -> None:
    """Run every patched site once on noise, which times both ways and chooses the faster."""
    models = [patched, *patched.get_nested_additional_models()]
    comfy.model_management.load_models_gpu(models)
    for call in site_calls(patched, application, batch, latent_size):
        with application.acting():
            call()
        comfy.model_management.throw_exception_if_processing_interrupted()


def site_calls(
    patched: comfy.model_patcher.ModelPatcher,
    application: Application,
    batch: int,
    latent_size: tuple[int, int],
) -> list[Callable[[], torch.Tensor]]:
    """Calls of each patched site alone, on noise of the size that it has for that latent."""
    dtype, device = compute_dtype(patched), patched.load_device
    options = patched.model_options.get("transformer_options", {})
    maps: dict[tuple[int, int, int], torch.Tensor] = {}
    calls = []
    for path in application.replaced:
        site = application.model_sites.sites[path]
        rows, columns = application.model_sites.map_size(path, *latent_size)
        shape = (batch, rows * columns, site.dim)
        if shape not in maps:
            maps[shape] = torch.randn(shape, dtype=dtype, device=device)
        place = application.model_sites.example_call(
            patched.model.diffusion_model, site, maps[shape], latent_size, options
        )
        forward = patched.object_patches[site.forward_key]
        calls.append(functools.partial(forward, maps[shape], **place))
    return calls


def detach(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` without any ΔConvBlocks."""
    clone = model.clone()
    clone.remove_additional_models(KEY)
    for event in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP, *CLONE_EVENTS):
        clone.remove_callbacks_with_key(event, KEY)
    for wrapper in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        clone.remove_wrappers_with_key(wrapper, KEY)
    restore_in_order(clone)
    take_silently(clone)
    for name, forward in list(clone.object_patches.items()):
        if binding := getattr(forward, "deltaconv", None):
            if binding.chained:
                # Keep its place in the order: another node's later patch may lie over it.
                clone.object_patches[name] = binding.original
            else:
                del clone.object_patches[name]
    return clone


def is_patched(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether ΔConvBlocks are attached to this MODEL already."""
    return bool(model.get_additional_models_with_key(KEY))


def _bind(
    patcher: comfy.model_patcher.ModelPatcher, application: Application, sites: Iterable[str]
) -> None:
    """Patch these sites over the forwards of this patcher's own model object."""
    blocks = patcher.get_additional_models_with_key(KEY)[0].model
    for path in sites:
        site = application.model_sites.sites[path]
        original, chained = original_forward(patcher, site.forward_key)
        on_map = application.replacing(site, ref(blocks[path]))
        forward = application.model_sites.wrap(site, original, on_map)
        forward.deltaconv = Binding(ref(patcher.model), ref(blocks), original, chained)
        patcher.add_object_patch(site.forward_key, forward)


def _rebind(application: Application, _, clone: comfy.model_patcher.ModelPatcher) -> None:
    """Clone callback: bind again the forwards of another model object or of other blocks."""
    say_what_is_taken(clone, application.say_on_running)
    (own,) = clone.get_additional_models_with_key(KEY)
    if not torch.is_inference_mode_enabled() and _made_in_inference(own.model):
        # Train LoRA passes gradients through its clone, and such weights let none through.
        load, arguments = own.cached_patcher_init[:2]
        clone.set_additional_models(KEY, [load(*arguments)])
    blocks = clone.get_additional_models_with_key(KEY)[0].model
    stale = []
    for path in application.replaced:
        forward = clone.object_patches.get(application.model_sites.sites[path].forward_key)
        binding = getattr(forward, "deltaconv", None)
        # Another node wrapped our forward; rebinding is its responsibility.
        if binding and (binding.model() is not clone.model or binding.blocks() is not blocks):
            stale.append(path)
    _bind(clone, application, stale)


def _let_gradients_pass(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """ON_PRE_RUN callback: an older Train LoRA clones in inference mode, and trains outside."""
    if torch.is_inference_mode_enabled() or patcher.is_dynamic():
        return
    (blocks,) = patcher.get_additional_models_with_key(KEY)
    for module in blocks.model.modules() if _made_in_inference(blocks.model) else ():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.clone(), False)


def _made_in_inference(blocks: torch.nn.Module) -> bool:
    return any(parameter.is_inference() for parameter in blocks.parameters())


def original_forward(patcher: comfy.model_patcher.ModelPatcher, key: str):
    """The forward at `key` beneath ours, and whether it is another node's object patch."""
    forward = patcher.object_patches.get(key)
    if binding := getattr(forward, "deltaconv", None):
        forward = binding.original if binding.chained else None
    if forward is not None:
        return forward, True
    return stock_forward(patcher, key), False
