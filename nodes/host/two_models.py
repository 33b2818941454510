"""Tell where a guider's two models are clones of one, of which ComfyUI runs the last one loaded."""

import math
from collections.abc import Sequence

import comfy.utils
from comfy.model_patcher import ModelPatcher

from .object_patches import PatchedView
from .sites import ModelSites

BOTH_PASSES = (
    "both models of this guider (as of Dual Model CFG Guider) are clones of one loaded model, "
    "which ComfyUI runs as the first of them in both passes: so blocks run in the second as well. "
    "Load the base twice, once for each."
)
TAKEN = (
    "no block of this MODEL ran: another clone of the same loaded model took its place while it "
    "was used, as the first model of Dual Model CFG Guider does with its second. Load the base "
    "twice, once for each."
)
# ComfyUI calls a guider's second model with the first one's wrappers, which note the step.
NO_RANGE = (
    "start_percent and end_percent are not heeded in the second model of a guider, as of Dual "
    "Model CFG Guider, so plain attention runs there. Leave them at 0 and 1 to have blocks."
)


def runs_in_both_passes(guider, model_sites: ModelSites, replaced: Sequence[str]) -> bool:
    """Whether a second model of the guider has other forwards, on the first one's modules."""
    first = guider.model_patcher
    # ComfyUI runs no second pass then.
    if math.isclose(getattr(guider, "cfg", 0.0), 1.0):
        return False
    keys = [model_sites.sites[path].forward_key for path in replaced]
    return any(
        other.model is first.model
        and any(other.object_patches.get(k) is not first.object_patches.get(k) for k in keys)
        for other in vars(guider).values()
        if isinstance(other, ModelPatcher)
    )


def not_these_blocks(
    patcher: ModelPatcher, model_sites: ModelSites, replaced: Sequence[str]
) -> bool:
    """Whether the model now has other forwards than this patcher would put there, at every site."""
    view = PatchedView(patcher, patcher.object_patches)
    for path in replaced:
        key = model_sites.sites[path].forward_key
        try:
            due, found = view[key], comfy.utils.get_attr(patcher.model, key)
        except AttributeError:
            # Another node exchanged the module above it, and said so.
            return False
        if due is found or not hasattr(due, "deltaconv"):
            return False
    return True
