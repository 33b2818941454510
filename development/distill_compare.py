"""Our recipe against the authors': equal time, equal search of rates, several seeds."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean

from .distill_demo import mean_psnr

RATES = (0.3, 1.0, 3.0, 10.0)
# Preset → its name in the figures: the paper's losses, and those of the authors' code for SD1.5.
AUTHORS = {"paper": "published losses", "code-sd15": "features alone, as the code for SD1.5"}
# Ours with blocks of our own kind; the other two train published ones.
TOKENS = "pooled tokens"
# Of the time of a whole run, for each rate.
SEARCH = 0.25
# Prompts of the error along sampling.
MEASURED = 4
# An error of the first step against one of the last, at the end of sampling (choice_search).
GROWTH = 50.0
TWELVE = (
    "red apple",
    "grinning face with smiling eyes",
    "sun with face",
    "slice of pizza",
    "cat face",
    "purple heart",
    "hibiscus",
    "hot dog",
    "green apple",
    "tiger face",
    "octopus",
    "rocket",
)


def compare_recipes(minutes: float, seeds: int, output: Path, against: str = "paper") -> dict:
    """Ours and the preset `against` for `minutes` per seed on the demo teacher; figures by recipe.

    Ours twice: with published blocks, and with pooled tokens. All at batch 8. Each recipe first
    runs seed 0 at each of `RATES` times its own rate, for a share of the time; the rate with the
    least error on held-out noise is used. A time is so many steps as fit it at the pace measured
    first, so that what else the machine does later changes no figure. The pictures' PSNR is that of
    seed 0, and so is "along", the error at each step of sampling the first of their prompts from
    other noise (`measure`); "grown" is their weighted sum. `output` is JSON, written after every
    run: a comparison of the same settings that was stopped goes on from it.
    """
    from ..cli.distill_config import Configuration
    from ..cli.distill_inputs import chosen_data, load_teacher
    from ..deltaconv.distillation import default_kernels, in_place_of_attention, plans_with_tokens

    authors = partial(_authors, against)
    tokens = partial(_ours, preset="tokens")
    presets = {AUTHORS[against]: authors, "ours": _ours, TOKENS: tokens}
    settings = {name: preset((1, 1), 1.0, 0) for name, preset in presets.items()}
    teacher = load_teacher(Configuration(), authors((0, 1), 1.0, 0))
    with teacher:
        data = chosen_data(Configuration(), teacher)
        published = default_kernels(teacher.model_sites.levels)
        blocks_of = {name: published for name in presets} | {TOKENS: plans_with_tokens(teacher)}
        identity = {"minutes": minutes, "rates": list(RATES), "search": SEARCH}
        results = _begun(output, identity, settings, blocks_of)

        @cache
        def expected():
            return twelve_pictures(teacher, {})

        @cache
        def path():
            return _path(teacher, data.unconditional)

        def keep():
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

        for name, preset in presets.items():
            kernels = blocks_of[name]
            if f"{name} joint" not in results["seconds"]:
                results["seconds"] |= _seconds_per_step(teacher, kernels, data, name, preset)
                print(f"Seconds: {results['seconds']}", flush=True)
                keep()

            def train(rate, seed, share, name=name, preset=preset, kernels=kernels):
                steps = _steps_within(minutes * 60 * share, name, results["seconds"])
                return _train(teacher, kernels, data, preset(steps, rate, seed))

            of_recipe = results.setdefault(name, {"search": {}, "runs": []})
            search, runs = of_recipe["search"], of_recipe["runs"]
            for rate in RATES:
                if str(rate) not in search:
                    search[str(rate)] = train(rate, 0, SEARCH)["mse"]
                    keep()
                print(f"{name}: rate × {rate}: mse {search[str(rate)]:.5f}", flush=True)
            of_recipe["rate"] = float(min(search, key=search.get))
            for seed in range(seeds):
                if seed == len(runs):
                    run = train(of_recipe["rate"], seed, 1)
                    blocks = run.pop("blocks")
                    if seed == 0:
                        run["psnr"] = mean_psnr(expected(), twelve_pictures(teacher, blocks))
                        run["along"] = path().errors(teacher, in_place_of_attention(blocks))
                        run["grown"] = grown(run["along"])
                    runs.append(run)
                    keep()
                print(f"{name}: seed {seed}: {runs[seed]}", flush=True)
            of_recipe["mse"] = mean(run["mse"] for run in runs[:seeds])
        keep()
    return results


def _begun(output: Path, identity: dict, settings: Mapping, blocks: Mapping) -> dict:
    """What a stopped comparison has found for recipes whose settings and blocks are the same."""
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    plain = {name: each.to_mapping() for name, each in settings.items()}
    # As JSON gives it back.
    kernels = json.loads(json.dumps(blocks, default=asdict))
    results = {**identity, "settings": plain, "blocks": kernels, "seconds": {}}
    if not (isinstance(found, dict) and identity.items() <= found.items()):
        return results
    before = found.get("settings", {})
    trained = found.get("blocks", {})
    # An entry that was added since is at its default there.
    for name in (name for name in settings if settings[name].matches(before.get(name))):
        if trained.get(name) != kernels[name]:
            continue
        results[name] = found.get(name, {})
        pace = found.get("seconds", {}).items()
        results["seconds"] |= {key: value for key, value in pace if key.startswith(f"{name} ")}
    return results


def _ours(steps: tuple[int, int], rate: float, seed: int, preset: str = "default"):
    from ..deltaconv.distillation import PRESETS

    settings = PRESETS[preset](seed=seed)
    return replace(
        settings,
        layers=_stage(settings.layers, steps[0], settings.layers.lr * rate),
        joint=_stage(settings.joint, steps[1], settings.joint.lr * rate),
    )


def _authors(preset: str, steps: tuple[int, int], rate: float, seed: int):
    from ..deltaconv.distillation import PRESETS

    settings = PRESETS[preset](seed=seed, unconditional=0.1)
    return replace(settings, joint=_stage(settings.joint, steps[1], 1e-3 * rate))


def _stage(stage, steps: int, lr: float):
    """The same batch, schedule and share of warm-up for both: only the recipes are compared."""
    return replace(stage, steps=steps, lr=lr, batch=8, schedule="cosine", warmup=steps // 10)


def _steps_within(budget: float, name: str, pace: Mapping[str, float]) -> tuple[int, int]:
    """Layer and joint steps: of ours, what a user's minutes give after the initialization."""
    from ..deltaconv.distillation import default_settings
    from ..deltaconv.distillation.plan import Pace, steps_within, with_steps

    if name in AUTHORS.values():
        return 0, int(budget / pace[f"{name} joint"])
    measured = Pace(pace[f"{name} layers"], pace[f"{name} joint"])
    rest = max(0.0, budget - pace[f"{name} init"])
    planned = steps_within(with_steps(default_settings(), 0, 0), measured, rest)
    return planned.layers.steps, planned.joint.steps


def _seconds_per_step(teacher, kernels, data, name: str, preset) -> dict[str, float]:
    """Seconds of the initialization and of a step of each stage, after a pass to warm up."""
    from ..deltaconv.distillation import distill

    seconds = {}
    settings = preset((0, 1), 1.0, 0)
    layers, joint = (max(2, stage.updates) for stage in (settings.layers, settings.joint))
    # As many steps as two passes of the base serve.
    steps = (0 if name in AUTHORS.values() else 2 * layers, max(5, 2 * joint))
    for record in distill(teacher, kernels, data, preset(steps, 1.0, 0)):
        after = layers if record.stage == "layers" else joint
        if record.stage == "init" or record.step > after:
            seconds.setdefault(f"{name} {record.stage}", []).append(record.seconds)
    return {stage: mean(values) for stage, values in seconds.items()}


def _train(teacher, kernels, data, settings) -> dict:
    """Blocks, their mse on held-out noise, and the seconds that training them took."""
    from ..deltaconv.distillation import distill
    from ..deltaconv.distillation.evaluation import held_out_error

    started = time.monotonic()
    for record in distill(teacher, kernels, data, settings):
        student = record.student
    seconds = time.monotonic() - started
    blocks = student.averaged_blocks()
    mse = held_out_error(teacher, blocks, data)
    steps = [settings.layers.steps, settings.joint.steps]
    return {"blocks": blocks, "mse": mse, "steps": steps, "seconds": seconds}


def grown(steps: Sequence[float]) -> float:
    """The sum of every step's error, weighted by how much larger those of early steps end up."""
    return sum(share * GROWTH ** (-at / len(steps)) for at, share in enumerate(steps))


def _path(teacher, unconditional):
    """The teacher's own sampling of the first of the twelve prompts."""
    import torch

    from ..deltaconv.distillation.measure import guided_path
    from ..nodes.host.conditioning import encode_prompts

    noise = torch.randn((MEASURED, 3, 64, 64), generator=torch.Generator().manual_seed(3))
    conditions = encode_prompts(teacher, TWELVE[:MEASURED], None)
    return guided_path(teacher, conditions, unconditional, noise)


def twelve_pictures(teacher, blocks: Mapping):
    """Pictures [12, 3, 64, 64] of the twelve prompts: one batch, seed 1, 30 steps, CFG 4."""
    import torch

    from ..deltaconv.distillation import in_place_of_attention, sample
    from ..nodes.host.conditioning import encode_prompts

    noise = torch.randn((12, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    conditions = encode_prompts(teacher, TWELVE, None)
    (unconditional,) = encode_prompts(teacher, [""], None)
    visit = in_place_of_attention(blocks)
    return sample(teacher, conditions, unconditional, noise, visit=visit).clamp(-1, 1)
