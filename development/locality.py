"""`python dev.py locality`: where the demo teacher's self-attention looks, on tensors from a file.

Reads x [B, 3, H, W] (noised pictures), timesteps [B] (0 … 999) and context [B, 12, 64], calls the
teacher once, and writes JSON: per site its map, the mean distance and that of uniform attention in
cells, the entropy in nats, and the mass within windows by their width, measured and uniform; means
over queries, heads and batch, over every query.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ..cli.host import entered
from . import DevelopmentError
from .comfyui.tree import chosen_tree
from .eval import call_unet, read_input


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py locality", description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="safetensors file to read")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    if not options.output.parent.is_dir():
        raise DevelopmentError(
            f"Expected --output in a folder that exists, got {options.output}. Make the folder."
        )
    tensors = read_input(options.input)
    with entered(chosen_tree()):
        sites = measure(tensors)
    write_json(options.output, sites)
    return 0


def measure(tensors: Mapping) -> dict[str, dict[str, object]]:
    """Site path → figures of the packaged teacher; `cli.host.enter` comes first."""
    import torch

    from ..deltaconv.locality.report import SiteLocality, measure_site
    from ..deltaconv.locality.settings import LocalityPlan
    from ..nodes.host.demo_model import load_demo_model
    from ..nodes.host.probe import Probe, probed
    from ..nodes.host.sites import find_sites

    with torch.inference_mode():
        model = load_demo_model()
        model_sites = find_sites(model)
        probe = Probe(model_sites, LocalityPlan(points=()), watching=True)
        call_unet(probed(model, model_sites, probe), tensors)
    measured = {}
    for path, calls in probe.take()[0].items():
        site, height, width = model_sites.sites[path], calls[0].height, calls[0].width
        found = SiteLocality(path, site.level, site.dim, height, width, [measure_site(calls, 0.0)])
        measured[path] = {
            "height": height,
            "width": width,
            "mean_distance": found.mean("distance"),
            "uniform_distance": found.uniform_distance,
            "entropy": found.mean("entropy"),
            "mass": _by_width(found, found.mass),
            "uniform_mass": _by_width(found, found.uniform_mass),
        }
    return measured


def write_json(path: Path, document: object) -> None:
    """Write a JSON file in one piece: an older one stays until the new one is whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise DevelopmentError(f"Cannot write {path}: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _by_width(site, mass: list[float]) -> dict[str, float]:
    return {str(width): value for width, value in zip(site.widths, mass, strict=True)}
