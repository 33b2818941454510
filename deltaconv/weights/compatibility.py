"""Check that ΔConv weights fit a model, and select the sites to replace."""

import fnmatch
import re
from collections.abc import Mapping

from ..families import family_title
from .model import DeltaConvWeights, WeightsError


def check_fit(weights: DeltaConvWeights, dims: Mapping[str, int], family: str) -> None:
    """Raise WeightsError unless every block has its site in a model of these dims and family.

    `dims` maps site path → channels of the model, `family` is "" where the model has no name.
    """
    name = weights.source or "these ΔConv weights"
    if family and weights.families and family not in weights.families:
        made_for = " or ".join(map(family_title, weights.families))
        raise WeightsError(
            f"Expected ΔConv weights for {family_title(family)}, the family of this model, got "
            f"{name} for {made_for}. Load the file that was made for this model."
        )
    if missing := [site for site in weights.sites if site not in dims]:
        raise WeightsError(
            f"Expected blocks for the {len(dims)} self-attention layers of this model, got {name} "
            f"with {len(missing)} of {len(weights.sites)} for layers it does not have "
            f"({_some(missing)}). The file was made for another architecture."
        )
    wrong = [
        f"{site}: {dim} channels, the model has {dims[site]}"
        for site, dim in weights.dims.items()
        if dim != dims[site]
    ]
    if wrong:
        raise WeightsError(
            f"Expected blocks as wide as this model's layers, got {name} with {len(wrong)} of "
            f"another width ({_some(wrong)}). The file was made for another architecture."
        )


def select_sites(levels: Mapping[str, int], selection: str) -> list[str]:
    """The sites that `selection` names, in network order.

    `levels` maps site path → resolution level. `selection` is a list, separated by commas or line
    breaks, of `all`, `level 0` (the highest resolution), `down`, `middle`, `up`, or a site path
    with wildcards; a leading `-` leaves the named sites out. An empty list means all. Raises
    ValueError for an entry that names no site, and for a selection that leaves none.
    """
    entries = [entry.strip() for entry in re.split(r"[,\n]", selection) if entry.strip()]
    if all(entry.startswith("-") for entry in entries):
        entries.insert(0, "all")
    chosen: set[str] = set()
    for entry in entries:
        found = _named(levels, entry.removeprefix("-").strip())
        if not found:
            raise ValueError(
                f"Expected sites of this model, got {entry!r}, which names none of them. Use all, "
                f"level 0 to {max(levels.values(), default=0)}, down, middle, up, or a path with "
                f"wildcards such as {_pattern_example(levels)}."
            )
        chosen = chosen - found if entry.startswith("-") else chosen | found
    if not chosen:
        raise ValueError(f"Expected at least one site, got {selection!r}, which leaves none.")
    return [site for site in levels if site in chosen]


_PARTS = {"down": "input_blocks.*", "middle": "middle_block.*", "up": "output_blocks.*"}


def _named(levels: Mapping[str, int], entry: str) -> set[str]:
    if entry == "all":
        return set(levels)
    if match := re.fullmatch(r"level\s*(\d+)", entry):
        return {site for site, level in levels.items() if level == int(match[1])}
    return set(fnmatch.filter(levels, _PARTS.get(entry, entry)))


def _pattern_example(levels: Mapping[str, int]) -> str:
    return next(iter(levels), "input_blocks.1.1").split(".")[0] + ".*"


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
