"""Encode the data of a distillation's configuration once: latents and text conditioning.

Takes the configuration of `deltaconv distill` with the entry `store`, the folder to write; that
command then trains on it, and loads neither CLIP nor VAE. Pictures are read part by part, a part
being 256 files of a folder or one WebDataset shard. It goes on where it stopped, and as many
processes as torchrun, Slurm or `accelerate launch` start share the parts, over one folder that all
of them see:

    deltaconv precompute --config distill.yaml
    torchrun --nproc_per_node 8 -m comfyui_deltaconv.cli precompute --config distill.yaml
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import CommandError

if TYPE_CHECKING:
    from ..deltaconv.scale.sources import Corruption, Pictures
    from ..deltaconv.scale.store import StoredItem
    from .distill_config import Configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="as for deltaconv distill")
    parser.add_argument("--comfyui", type=Path, metavar="PATH", help="as for deltaconv distill")


def run(options: argparse.Namespace) -> int:
    from .distill_config import read_configuration
    from .host import entered, find_comfyui

    configuration = read_configuration(options.config)
    if not configuration.store:
        raise CommandError("Expected the entry store, the folder to write, got none. Add it.")
    if configuration.prompts or configuration.data == "demo":
        raise CommandError(
            "Expected pictures to precompute as the entry data, a folder or shards, got none. The "
            "demo's own and a model's samples need no store."
        )
    with entered(find_comfyui(options.comfyui), accelerator=True):
        precompute_as(configuration)
    return 0


def precompute_as(configuration: "Configuration") -> None:
    """This process's parts of the store that is configured; those that are whole stay."""
    import torch

    from ..deltaconv.distillation import DistillationSettings
    from ..deltaconv.scale.sources import Corruption
    from ..deltaconv.scale.store import Store
    from ..nodes.host.conditioning import encode_prompts
    from .distill_inputs import load_teacher, picture_sizes, source_of

    rank, count = (int(os.environ.get(name) or at) for name, at in (("RANK", 0), ("WORLD_SIZE", 1)))
    if torch.accelerator.is_available() and count > 1:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK") or 0))
    source = source_of(configuration)
    try:
        teacher = load_teacher(configuration, DistillationSettings())
        sizes = picture_sizes(configuration, teacher)
        store = Store(Path(configuration.store or ""))
        identity = {
            "base": teacher.fingerprint,
            "data": source.digest,
            "parts": source.parts,
            "sizes": sizes,
        }
        store.begin(identity, encode_prompts(teacher, [""], teacher.clip)[0])
        done, corruption, items = store.done(), Corruption(configuration.corrupt), 0
        # By number alone: what others have done meanwhile must not shift who does what.
        for part in range(rank, source.parts, count):
            if part in done:
                continue
            started, before = time.monotonic(), len(corruption.skipped)
            skipped: dict[str, str] = {}
            found = _encoded(teacher, source, part, sizes, corruption, skipped)
            wrote = store.write(part, found, skipped)
            items += wrote
            rate = wrote / max(time.monotonic() - started, 1e-9)
            lost = len(corruption.skipped) - before
            text = f"part {part + 1} of {source.parts}: {wrote} items, {rate:.1f} per second"
            print(f"{text}, {lost} corrupt" if lost else text, flush=True)
        done = store.done()
        if len(done) == source.parts:
            # Of all processes and earlier runs: a few parts alone may be worse than the whole.
            skipped = {name: why for part in done.values() for name, why in part["skipped"].items()}
            total = sum(part["items"] for part in done.values()) + len(skipped)
            Corruption(configuration.corrupt, total, skipped).check()
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    if corruption.skipped:
        print(f"{corruption}: {', '.join(corruption.skipped)}.", flush=True)
    whole = f"{len(done)} of {source.parts} parts are there"
    print(f"{items} items new in {configuration.store}; {whole}.", flush=True)


def _encoded(
    teacher,
    source: "Pictures",
    part: int,
    sizes: list[tuple[int, int]],
    corruption: "Corruption",
    skipped: dict[str, str],
) -> Iterator["StoredItem"]:
    """The items of a part with their latents and conditioning; fills `skipped`."""
    import torch

    from ..deltaconv.scale.store import StoredItem
    from ..nodes.host.conditioning import encode_prompts
    from .distill_inputs import cut, encode_picture

    for item in source.items(part):
        found = corruption.read(item)
        if found is None:
            skipped[item.name] = corruption.skipped[item.name]
            continue
        picture, caption = found
        with torch.inference_mode():
            latent = encode_picture(teacher, cut(picture, sizes))
            (entry,) = encode_prompts(teacher, [caption], teacher.clip)
        yield StoredItem(item.name, caption, latent, entry)
