"""The authors' names of a family's sites."""

from comfyui_deltaconv.deltaconv.families import FAMILIES, to_published


def published_paths(family: str) -> dict[str, str]:
    """Site path → published path, in network order."""
    known = FAMILIES[family]
    return {site: to_published(site, known.num_res_blocks) for site in known.dims}
