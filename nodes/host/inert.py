"""Find what other nodes did to replaced layers: without effect there, or in the blocks' way."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import BypassInjectionManager, WeightAdapterBase

from ...deltaconv.application.report import Inert, inert_sentences
from .object_patches import PatchedView
from .sites import ModelSites


def inert_parts(
    patcher: ModelPatcher,
    model_sites: ModelSites,
    replaced: Sequence[str],
    transformer_options: Sequence[Mapping] = (),
) -> dict[str, str]:
    """Kind → sentence, for everything this patcher shows.

    `transformer_options` are what one sampling adds to the patcher's own, as hooks do.
    """
    sites = [model_sites.sites[path] for path in replaced]
    inside = tuple(site.weight_prefix for site in sites)
    forwards = {site.forward_key for site in sites}
    weights = Counter(kind for name, kind in _weight_patches(patcher) if name.startswith(inside))
    modules = sum(
        path.startswith(inside) and path not in forwards for path in patcher.object_patches
    )
    options = [patcher.model_options.get("transformer_options", {}), *transformer_options]
    return inert_sentences(
        Inert(
            weights=weights,
            modules=modules,
            attention=sum(
                any(model_sites.is_taken(p, entry) for entry in options) for p in replaced
            ),
            covered=_covered(patcher, forwards),
            trained=_trained(patcher, inside),
            replaced=len(replaced),
        )
    )


def _weight_patches(patcher: ModelPatcher) -> Iterator[tuple[str, str]]:
    """(name of the weight or its module, kind of patch) for every patch."""
    for name, patches in patcher.patches.items():
        for patch in patches:
            yield name, _kind(patch[1])
    for hook_patches in patcher.hook_patches.values():
        for name, patches in hook_patches.items():
            for patch in patches:
                yield name, f"{_kind(patch[1])} of hooks"
    for injections in patcher.injections.values():
        for injection in injections:
            for name in _bypassed(injection.inject):
                yield name, "LoRA patches of LoraLoaderBypass"


def _kind(patch: object) -> str:
    """Which kind of node made a weight patch, judged by its form."""
    if isinstance(patch, WeightAdapterBase):
        return "LoRA patches"
    # A merge holds the other model's weight and the patches on it.
    if isinstance(patch, list):
        return "patches of a model merge"
    # No weight is added, only the strength changes.
    if isinstance(patch, tuple) and len(patch) == 1 and patch[0] is None:
        return "multiplications of weights"
    return "weight patches"


def _bypassed(inject: Callable) -> Iterator[str]:
    """Names of the modules that ComfyUI's bypass LoRA wraps, from its injection's closure."""
    for cell in getattr(inject, "__closure__", None) or ():
        # ValueError: the cell is still empty.
        with suppress(ValueError):
            if isinstance(cell.cell_contents, BypassInjectionManager):
                yield from cell.cell_contents.adapters


def _trained(patcher: ModelPatcher, inside: tuple[str, ...]) -> int:
    """In how many layers a node trains what it puts around the weights."""
    trained = set()
    for name, wrappers in patcher.weight_wrapper_patches.items():
        parameters = (p for each in wrappers for p in getattr(each, "parameters", list)())
        if any(parameter.requires_grad for parameter in parameters):
            trained.update(prefix for prefix in inside if name.startswith(prefix))
    return len(trained)


def _covered(patcher: ModelPatcher, forwards: set[str]) -> int:
    """How many of our forwards are covered: another object is called at their paths."""
    view = PatchedView(patcher, patcher.object_patches)
    count = 0
    for path in forwards:
        try:
            count += not hasattr(view[path], "deltaconv")
        except AttributeError:
            # Another node's module lacks the layer.
            count += 1
    return count
