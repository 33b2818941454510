"""The self-attention sites of a loaded MODEL; only this folder knows ComfyUI's model classes."""

from comfy.model_patcher import ModelPatcher

from ..object_patches import restore_modules
from .base import OTHERS, Heads, ModelSites, OnMap, Site, SiteCall, differentiable_attention
from .cosmos import CosmosSites
from .pixart import PixArtSites
from .unet import UNetSites

__all__ = [
    "OTHERS",
    "Heads",
    "ModelSites",
    "OnMap",
    "Site",
    "SiteCall",
    "differentiable_attention",
    "find_sites",
]

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
