"""The toy of `toy_teacher`, distilled by the processes that torchrun started; writes what each saw.

`torchrun … toy_parallel.py FOLDER LAYERS JOINT [ENTRY=VALUE …]`: rank r writes FOLDER/rank-r.json.
Entries are of the settings in JSON; `stall=SECONDS`, `accumulate=PARTS` and `stop=RANK:STEP`, the
step after which that rank asks all to stop.
"""

import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
import toy_teacher as toy
from comfyui_deltaconv.deltaconv.distillation import Dataset, distill
from comfyui_deltaconv.deltaconv.scale.engine import ParallelEngine


def toy_sizes(count: int = 26) -> Dataset:
    """Toy data of two sizes."""
    data = toy.toy_data(count)
    latents = [
        latent[:, :8, :].contiguous() if index % 3 == 0 else latent
        for index, latent in enumerate(data.latents)
    ]
    return Dataset(latents, data.conditions, data.unconditional)


def toy_run(layers, joint, changes, folder=None, engine=None, stop=None):
    """The records of a distillation with these settings, as plain data, and its student."""
    accumulate = changes.pop("accumulate", 1)
    settings = toy.toy_settings(layers, joint, **changes)
    settings = replace(
        settings,
        layers=replace(settings.layers, batch=8, accumulate=accumulate),
        joint=replace(settings.joint, batch=8, accumulate=accumulate),
    )
    records = distill(
        toy.ToyTeacher(), toy.PLAN, toy_sizes(), settings, folder=folder, engine=engine
    )
    seen = []
    with closing(records):
        for record in records:
            seen.append(record.to_mapping() | {"number": len(record.history)})
            if engine and stop == [getattr(engine, "rank", 0), len(record.history)]:
                engine.ask_to_stop()
            if engine and engine.stopping:
                break
    return seen, record.student


def main(folder, layers, joint, *entries):
    torch.set_num_threads(1)
    changes = {name: json.loads(value) for name, value in (each.split("=") for each in entries)}
    stop = changes.pop("stop", None)
    stall = changes.pop("stall", 600.0)
    engine = ParallelEngine(stall)
    rank = engine.rank
    seen, student = toy_run(int(layers), int(joint), changes, Path(folder) / "state", engine, stop)
    weights = {name: p.detach().double().sum().item() for name, p in student.parameters.items()}
    text = json.dumps({"records": seen, "weights": weights})
    (Path(folder) / f"rank-{rank}.json").write_text(text, encoding="utf-8")
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
