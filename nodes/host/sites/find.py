"""Which kind a loaded MODEL is of, and why not where it is of none."""

import torch
from comfy.model_patcher import ModelPatcher

from .base import ModelSites
from .cosmos import CosmosSites
from .pixart import PixArtSites
from .unet import UNetSites

# To add a family of another kind: one class in a file beside these, one row here.
KINDS = (UNetSites, PixArtSites, CosmosSites)

# Attention over text and image tokens at once: no module in them sees the image alone.
_JOINT = {
    "Flux",
    "MMDiT",
    "OpenAISignatureMMDITWrapper",
    "QwenImageTransformer2DModel",
    "HiDreamImageTransformer2DModel",
}


def find_sites(model: ModelPatcher) -> ModelSites:
    """The self-attention sites of a model of one of the kinds.

    Raises ValueError, in one sentence that says why, for models that have none.
    """
    restore_modules(model)
    for kind in KINDS:
        if sites := kind.of(model):
            return sites
    raise ValueError(_why_not(type(model.model.diffusion_model).__name__))


def _why_not(name: str) -> str:
    if name in _JOINT:
        reason = (
            "its attention runs over text and image together, so no layer can be replaced alone"
        )
    else:
        reason = "no ΔConv layout is defined for it"
    return (
        "Expected a MODEL of SD1.x, SD2.x, SDXL (a UNet), PixArt-α/Σ, Anima or Cosmos-Predict2, "
        f"got {name}: {reason}. Connect a model of one of these families."
    )


def restore_modules(patcher: ModelPatcher) -> None:
    """Take exchanged modules of any loaded clone off the model, so that its layers can be found.

    ComfyUI puts them on again when it next loads that clone, as it does for every sampling.
    """
    exchanged = patcher.object_patches_backup.items()
    if any(
        isinstance(was, torch.nn.Module) and path.startswith("diffusion_model")
        for path, was in exchanged
    ):
        patcher.unpatch_model(unpatch_weights=False)
