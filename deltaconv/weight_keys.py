"""Which tensors of a file belong to which site, by their names alone."""

import re
from collections import defaultdict
from collections.abc import Iterable

from .families import from_published
from .weights import WeightsError

# `base:`, `base_ema:` (a nested state dict, flattened), `unet.`, `denoiser.` … in front.
_PUBLISHED_KEY = re.compile(
    r"(?P<prefix>(?:\w+:)*(?:[A-Za-z_]+\.)*?)"
    r"(?P<path>(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+"
    r"|transformer_blocks\.\d+)\.conv1\.(?P<tensor>.+)"
)
_OWN_KEY = re.compile(
    r"(?P<site>.+)\.(?:(?P<linear>conv_up|conv_out|conv_pool)\.(?:weight|bias)"
    r"|gates\.\d+\.conv_spatial\.(?:weight|bias))"
)


def published_keys(keys: Iterable[str], source: str) -> dict[str, dict[str, str]]:
    """Site path → published tensor name → key, for the diffusers naming; {} where there is none.

    Of several sets the EMA set is taken. Raises WeightsError for sets that compete otherwise, and
    for paths that no known model has.
    """
    sets: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in keys:
        if match := _PUBLISHED_KEY.fullmatch(key):
            sets[match["prefix"]][match["path"]][match["tensor"]] = key
    if not sets:
        return {}
    preferred = [prefix for prefix in sets if "ema" in re.split(r"[:._]", prefix)] or list(sets)
    if len(preferred) > 1:
        raise WeightsError(
            f"Expected one set of ΔConv blocks in {source}, got {len(preferred)} under the "
            f"prefixes {sorted(preferred)}. Keep one of them in the file."
        )
    blocks = sets[preferred[0]]
    sites = {path: from_published(path) for path in blocks}
    if unknown := sorted(path for path, site in sites.items() if site is None):
        raise WeightsError(
            f"Expected diffusers paths of SD, SDXL or PixArt in {source}, got {unknown[0]}, which "
            "none of these models has."
        )
    return {sites[path]: block for path, block in blocks.items()}


def own_keys(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Site path → published tensor name → key, for our own naming; {} where there is none."""
    keys = list(keys)
    modules = defaultdict(set)
    for match in filter(None, map(_OWN_KEY.fullmatch, keys)):
        modules[match["site"]].add(match["linear"] or "gates")
    # A lone conv_out is a VAE's or a UNet's last layer, not a block.
    by_site = {site: {} for site, found in modules.items() if len(found) > 1}
    for key in keys:
        # A key belongs to the longest site path in front of it, whatever its tensor is called.
        parts = key.split(".")
        heads = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        if site := next((head for head in heads if head in by_site), None):
            by_site[site][key[len(site) + 1 :]] = key
    return by_site


def network_order(site: str) -> tuple:
    """Sort key that puts site paths in the order in which the network runs them."""
    parts = {"input_blocks": 0, "middle_block": 1, "output_blocks": 2}
    return tuple(
        (0, int(word), "") if word.isdigit() else (parts.get(word, 3), 0, word)
        for word in site.split(".")
    )
