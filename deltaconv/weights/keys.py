"""Group the tensors of a file by site, from their names."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..families import from_published
from .header import named, shortened
from .model import WeightsError

_PUBLISHED_PATH = re.compile(
    r"(?:(?:(?:down|up)_blocks\.N|mid_block)\.attentions\.N\.)?transformer_blocks\.N".replace(
        "N", "(?:0|[1-9][0-9]*)"
    )
)
# How many parts a published path has: down and up, middle, PixArt.
_PUBLISHED_PARTS = (6, 5, 2)
# What stands in front of a path is no prefix where it is part of another model's path.
_INSIDE_A_MODEL = re.compile(r"(?:^|[.:])\w*(?:blocks?|attentions)\.")
_OWN_KEY = re.compile(
    r"(?P<site>.+)\.(?:(?P<linear>conv_up|conv_out|conv_pool)\.(?:weight|bias)"
    r"|gates\.\d+\.conv_spatial\.(?:weight|bias))"
)
# A block's own have at most four: gates, scale, conv_spatial, weight.
_MOST_PARTS = 6

# Site path → published tensor name → key.
Blocks = Mapping[str, Mapping[str, str]]


def published_keys(keys: Iterable[str], source: str) -> tuple[Blocks, str]:
    """Blocks in the diffusers naming, and a note on which of two sets was taken; ({}, "") for none.

    Of a set and its EMA the EMA is taken, unless it lacks tensors of the other. Raises WeightsError
    for any other choice of sets, and for paths that no known model has.
    """
    sets: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in keys:
        if parts := _published_parts(key):
            prefix, path, tensor = parts
            sets[prefix][path][tensor] = key
    if not sets:
        return {}, ""
    prefix, note = _chosen_set(sets, source)
    blocks = sets[prefix]
    sites = {path: site for path in blocks if (site := from_published(path))}
    if unknown := sorted(blocks.keys() - sites.keys()):
        raise _unknown_path(unknown[0], source)
    return {sites[path]: block for path, block in blocks.items()}, note


def _published_parts(key: str) -> tuple[str, str, str] | None:
    """Prefix, path and tensor name of a published key; None for any other.

    In front of the path stand `base:`, `base_ema:` (a nested state dict, flattened), `unet.`,
    `models.0.` and the like. Parsed from the end, because a key may be anything, and long.
    """
    head, _, tensor = key.partition(".conv1.")
    if not tensor:
        return None
    parts = head[head.rfind(":") + 1 :].rsplit(".", max(_PUBLISHED_PARTS))
    for count in _PUBLISHED_PARTS:
        path = ".".join(parts[-count:])
        if _PUBLISHED_PATH.fullmatch(path):
            prefix = head.removesuffix(path)
            return None if _INSIDE_A_MODEL.search(prefix) else (prefix, path, tensor)
    return None


def _chosen_set(sets: Mapping[str, Blocks], source: str) -> tuple[str, str]:
    """The prefix of the set to read, and a note on that choice."""
    averaged = [prefix for prefix in sets if "ema" in re.split(r"[:._-]", prefix)]
    plain = [prefix for prefix in sets if prefix not in averaged]
    if len(averaged or plain) > 1:
        raise WeightsError(
            f"Expected one set of ΔConv blocks in {source}, got {len(averaged or plain)} under the "
            f"prefixes {named(sorted(averaged or plain))}. Keep one of them in the file."
        )
    if not averaged or not plain:
        return (averaged or plain)[0], ""
    ema = averaged[0]
    missing = {other: _lacking(sets[ema], sets[other]) for other in plain}
    if not any(missing.values()):
        return ema, ""
    lacking = max(missing.values(), key=len)
    if len(plain) == 1 and not (also := _lacking(sets[plain[0]], sets[ema])):
        return plain[0], (
            f"the set {shortened(plain[0])}, because {shortened(ema)} lacks {len(lacking)} tensors "
            "of it"
        )
    other = f", and {named(plain)} lacks {named(also)}" if len(plain) == 1 else ""
    raise WeightsError(
        f"Expected one complete set of ΔConv blocks in {source}, got {named([ema])}, which lacks "
        f"{named(lacking)}{other}. Get the file again, or keep one set in it."
    )


def _lacking(blocks: Blocks, others: Blocks) -> list[str]:
    """Tensors of `others` that `blocks` lacks, by name without prefix."""
    return [
        f"{path}.conv1.{tensor}"
        for path, block in others.items()
        for tensor in block
        if tensor not in blocks.get(path, ())
    ]


def own_keys(keys: Iterable[str]) -> Blocks:
    """Blocks in our own naming; {} where there are none."""
    keys = list(keys)
    modules = defaultdict(set)
    for match in filter(None, map(_OWN_KEY.fullmatch, keys)):
        modules[match["site"]].add(match["linear"] or "gates")
    # A lone conv_out is a VAE's or a UNet's last layer, not a block.
    by_site = {site: {} for site, found in modules.items() if len(found) > 1}
    for key in keys:
        # A key belongs to the longest site path in front of it, whatever its tensor is called.
        site = key
        for _ in range(_MOST_PARTS):
            site, dot, _ = site.rpartition(".")
            if dot and site in by_site:
                by_site[site][key[len(site) + 1 :]] = key
                break
    return by_site


def refuse_published(sites: Iterable[str], source: str) -> None:
    """Raise WeightsError for blocks named as published ones are, at a path that no model has."""
    if path := next((site for site in sites if site.endswith(".conv1")), None):
        raise _unknown_path(path, source)


def _unknown_path(path: str, source: str) -> WeightsError:
    return WeightsError(
        f"Expected diffusers paths of SD, SDXL or PixArt in {source}, got {shortened(path)}, which "
        "none of these models has."
    )


def network_order(site: str) -> tuple:
    """Sort key that puts site paths in the order in which the network runs them."""
    parts = {"input_blocks": 0, "middle_block": 1, "output_blocks": 2}
    return tuple(
        (0, int(word), "") if word.isdecimal() else (parts.get(word, 3), 0, word)
        for word in site.split(".")
    )
