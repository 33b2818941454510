"""The self-attention sites of a loaded MODEL: the one file that knows ComfyUI's model classes."""

from collections.abc import Mapping
from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher

from ...deltaconv.families import families_of, resolution_level
from ...deltaconv.flops import halved
from .object_patches import restore_modules

# Attention over text and image tokens at once: no module in them sees the image alone.
_JOINT = {
    "Flux",
    "MMDiT",
    "OpenAISignatureMMDITWrapper",
    "QwenImageTransformer2DModel",
    "HiDreamImageTransformer2DModel",
}

# What one prompt is long, unless it is longer.
_CLIP_TOKENS = 77


@dataclass(frozen=True)
class Site:
    """One self-attention module: its path inside the diffusion model, channels, level, weights.

    `level` is how often the map was halved; `parameters` counts the attention's own weights.
    """

    path: str
    dim: int
    level: int
    parameters: int

    @property
    def forward_key(self) -> str:
        """Name of the object patch that replaces this site's forward."""
        return f"diffusion_model.{self.path}.forward"

    @property
    def weight_prefix(self) -> str:
        """What the names of the attention's own weights start with."""
        return f"diffusion_model.{self.path}."


@dataclass(frozen=True)
class ModelSites:
    """The sites of one model in network order, and how its maps come from the latent.

    `patch_size` is None for a UNet; for PixArt it is how many latent cells a token is wide.
    """

    family: str
    sites: Mapping[str, Site]
    patch_size: int | None

    @property
    def dims(self) -> dict[str, int]:
        """Site path → channels C."""
        return {path: site.dim for path, site in self.sites.items()}

    @property
    def levels(self) -> dict[str, int]:
        """Site path → resolution level."""
        return {path: site.level for path, site in self.sites.items()}

    def map_size(self, path: str, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens at a site, for a latent of that height and width."""
        if self.patch_size:
            return height // self.patch_size, width // self.patch_size
        level = self.sites[path].level
        return halved(height, level), halved(width, level)


def find_sites(model: ModelPatcher) -> ModelSites:
    """The self-attention sites of a UNet or PixArt model.

    Raises ValueError, in one sentence that says why, for models that have none.
    """
    restore_modules(model)
    diffusion_model = model.model.diffusion_model
    for finder in (_unet_sites, _pixart_sites):
        if sites := finder(model, diffusion_model):
            return sites
    raise ValueError(_why_not(type(diffusion_model).__name__))


def text_shape(model: ModelPatcher) -> tuple[int, int]:
    """Tokens and channels of the encoded prompt that a UNet or PixArt model is made for."""
    from comfy.ldm.modules.attention import BasicTransformerBlock

    diffusion_model = model.model.diffusion_model
    if embedder := getattr(diffusion_model, "y_embedder", None):
        return tuple(embedder.y_embedding.shape)
    for module in diffusion_model.modules():
        if isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
            return _CLIP_TOKENS, module.attn2.to_k.in_features
    raise ValueError("Expected a model that reads a prompt, got one without cross-attention.")


def recomputable_modules(model: ModelPatcher) -> list[str]:
    """Paths inside the diffusion model that are small to keep, and large to keep all within."""
    names = {"ResBlock", "SpatialTransformer", "PixArtMSBlock"}
    modules = model.model.diffusion_model.named_modules()
    return [path for path, module in modules if type(module).__name__ in names]


def differentiable_attention(function, *args, **kwargs):
    """An `optimized_attention_override` by torch's own attention, which has a backward pass."""
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(*args, **kwargs)


def _unet_sites(model: ModelPatcher, unet) -> ModelSites | None:
    from comfy.ldm.modules.attention import BasicTransformerBlock
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    if not isinstance(unet, UNetModel):
        return None
    sites = {}
    for name, module in unet.named_modules():
        # Video models attend over time in their time_stack; that is no map.
        if not isinstance(module, BasicTransformerBlock) or ".time_stack." in name:
            continue
        if module.disable_self_attn:
            continue
        path = f"{name}.attn1"
        level = resolution_level(path, unet.num_res_blocks)
        sites[path] = Site(path, module.attn1.to_q.in_features, level, _parameters(module.attn1))
    if not sites:
        raise ValueError("Expected a UNet with self-attention layers, got one without any.")
    family = _family(model, {path: site.dim for path, site in sites.items()})
    if family == "sd1" and model.model.model_config.unet_config.get("context_dim") == 1024:
        family = "sd2"
    return ModelSites(family, sites, None)


def _pixart_sites(model: ModelPatcher, transformer) -> ModelSites | None:
    from comfy.ldm.pixart.pixartms import PixArtMS

    if not isinstance(transformer, PixArtMS):
        return None
    sites = {}
    for index, block in enumerate(transformer.blocks):
        path = f"blocks.{index}.attn"
        sites[path] = Site(path, block.attn.proj.out_features, 0, _parameters(block.attn))
    family = _family(model, {path: site.dim for path, site in sites.items()})
    return ModelSites(family, sites, transformer.patch_size)


def _family(model: ModelPatcher, dims: Mapping[str, int]) -> str:
    """The family whose sites are exactly these; a model of our own names itself."""
    named = getattr(type(model.model.model_config), "deltaconv_family", "")
    exact = [family.name for family in families_of(dims) if len(family.dims) == len(dims)]
    return named or next(iter(exact), "")


def _parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _why_not(name: str) -> str:
    if name in _JOINT:
        reason = (
            "its attention runs over text and image together, so no layer can be replaced alone"
        )
    else:
        reason = "no ΔConv layout is defined for it"
    return (
        f"Expected a MODEL of SD1.x, SD2.x, SDXL (a UNet) or PixArt-α/Σ, got {name}: {reason}. "
        "Connect a model of one of these families."
    )
