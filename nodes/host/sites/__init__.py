"""The self-attention sites of a loaded MODEL; only this folder knows ComfyUI's model classes."""

from .base import OTHERS, Heads, ModelSites, OnMap, Site, SiteCall, differentiable_attention
from .find import find_sites

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
