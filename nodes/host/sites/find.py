"""Which kind a loaded MODEL is of, and why not where it is of none."""

import torch
from comfy.model_patcher import ModelPatcher

from .base import ModelSites
from .cosmos import CosmosSites
from .hunyuandit import HunyuanDiTSites
from .kandinsky import KandinskySites
from .ltxv import LTXVSites
from .pixart import PixArtSites
from .unet import UNetSites
from .wan import WanSites

# To add a family of another kind: one class in a file beside these, one row here.
KINDS = (
    UNetSites,
    PixArtSites,
    CosmosSites,
    HunyuanDiTSites,
    WanSites,
    KandinskySites,
    LTXVSites,
)

# Attention over text and image tokens at once: no module in them sees the image alone.
_JOINT = {
    "AsymmDiTJoint",
    "BooguTransformer2DModel",
    "Chroma",
    "ChromaRadiance",
    "CogVideoXTransformer3DModel",
    "ErnieImageModel",
    "Flux",
    "HiDreamImageTransformer2DModel",
    "HiDreamO1Transformer",
    "HunyuanVideo",
    "Ideogram4Transformer2DModel",
    "JoyImageTransformer3DModel",
    "LensTransformer2DModel",
    "MageFlowTransformer2DModel",
    "MMDiT",
    "NextDiT",
    "NextDiTPixelSpace",
    "OmniGen2Transformer2DModel",
    "OpenAISignatureMMDITWrapper",
    "QwenImageTransformer2DModel",
    "SingleStreamDiT",
}
# Relatives of models that work, which bring more to their attention than one image.
_MORE = {
    "AnimateWanModel": "poses and faces",
    "CameraWanModel": "the path of a camera",
    "CausalWanModel": "the frames before",
    "HumoWanModel": "sound",
    "LTXAVModel": "sound",
    "SCAIL2WanModel": "poses",
    "SCAILWanModel": "poses",
    "VaceWanModel": "control images",
    "WanDancerModel": "music",
    "WanModel_S2V": "sound",
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
            "not yet, as its attention runs over text and image together, and a block computes the "
            "image alone"
        )
    elif name in _MORE:
        reason = f"not yet, as it is made for {_MORE[name]} beside one image"
    else:
        reason = "no ΔConv layout is defined for it"
    return (
        "Expected a MODEL of SD1.x, SD2.x, SDXL (a UNet), PixArt-α/Σ, Anima, Cosmos-Predict2, "
        "HunyuanDiT, Wan 2.1/2.2, Kandinsky 5 or LTX-Video, "
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
