"""What a user's own minutes give with a choice of layers and steps: PSNR of twelve pictures."""

import json
import time
from pathlib import Path

from .distill_compare import TWELVE
from .distill_demo import demo_data, mean_psnr

STEPS = 20


def measure_balanced(
    minutes: float,
    seeds: int,
    side: int,
    output: Path,
    *,
    wanted: str = "balanced",
    tokens: bool = False,
) -> dict:
    """Distill the demo teacher for `minutes` per seed with the choice `wanted`; its figures.

    At pictures of `side` pixels, batch 8, as the node does it: initialization, choice and steps fit
    into the time, and steps are planned from the pace. The choice is made on two prompts that are
    not among `TWELVE`, from noise of its own; the pictures are drawn in `STEPS` Euler steps at CFG
    4. Blocks are published ones, or those with pooled tokens. `output` is JSON, written after every
    seed: a measurement of the same kind that was stopped goes on from it.
    """
    from ..cli.distill_config import Configuration
    from ..cli.distill_inputs import load_teacher
    from ..deltaconv.distillation import PRESETS, default_kernels, plans_with_tokens
    from ..deltaconv.distillation.plan import with_steps
    from ..deltaconv.distillation.settings import read_plan

    identity = {"minutes": minutes, "side": side, "choice": wanted, "steps": STEPS}
    if tokens:
        identity["kernels"] = "5 and pooled tokens"
    preset = PRESETS["tokens" if tokens else "default"]
    results, expected = _begun(output, identity), []
    for seed in range(len(results["runs"]), seeds):
        settings = with_steps(preset(seed=seed, ema=0.9), 0, 0)
        teacher = load_teacher(Configuration(), settings, joint=True)
        published = default_kernels(teacher.model_sites.levels)
        plans = read_plan(plans_with_tokens(teacher) if tokens else published, teacher.dims)
        data = demo_data(teacher, side)
        run = _distilled(teacher, plans, data, settings, minutes, wanted, expected)
        results["runs"].append(run)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{side} × {side}, seed {seed}: {run}", flush=True)
    return results


def _begun(output: Path, identity: dict) -> dict:
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    same = isinstance(found, dict) and identity.items() <= found.items()
    return found if same else {**identity, "runs": []}


def _distilled(teacher, plans, data, settings, minutes: float, wanted: str, expected: list) -> dict:
    """One run: what was chosen, planned and reached. `expected` keeps the teacher's pictures."""
    from ..deltaconv.distillation import distill
    from ..deltaconv.distillation.evaluation import held_out_error
    from ..nodes.host.distill_choice import chooser
    from ..nodes.host.distill_time import TimeBudget

    budget, said = TimeBudget(60 * minutes), []
    shape = tuple(data.latents[0].shape)
    side = shape[-1]
    others = [i for i, text in enumerate(_captions()) if text not in TWELVE]
    choose = chooser(
        teacher.patcher,
        teacher,
        plans,
        "scaled",
        shape,
        conditions=[data.conditions[i] for i in others[settings.seed :: 100]],
        unconditional=data.unconditional,
        wanted=wanted,
        seed=settings.seed,
        said=said.append,
    )
    with teacher:
        settings = budget.fitted(settings, teacher, data.conditions, shape)
        pictures = {}
        for record in distill(teacher, plans, data, settings, choose=choose, plan=budget.plan):
            # Of the first seed alone: it takes minutes, and says the same of all.
            if record.stage == "choice" and not expected:
                chosen, since = record.student, time.monotonic()
                pictures["chosen"] = drawn(teacher, chosen.averaged_blocks(), side, chosen.start)
                # A picture on the way is no part of the time.
                budget.began += time.monotonic() - since
            if budget.over and record.step < record.steps:
                break
        student, seconds = record.student, budget.spent
        blocks = student.averaged_blocks()
        pictures["trained"] = drawn(teacher, blocks, side, student.start)
        if not expected:
            expected.append(drawn(teacher, {}, side))
        return {
            "choice": said,
            "layers": list(blocks),
            "start": student.start,
            "steps": [record.settings.layers.steps, record.settings.joint.steps],
            "init_images": settings.init_images,
            "seconds": seconds,
            "mse": held_out_error(teacher, blocks, data),
            "psnr": {name: mean_psnr(expected[0], found) for name, found in pictures.items()},
        }


def _captions() -> list[str]:
    from ..deltaconv import demo

    return demo.pictures()[1]


def drawn(teacher, blocks, side: int, start: float = 0.0):
    """Pictures [12, 3, H, W] of the twelve prompts with blocks from `start` on, seed 1."""
    import torch

    from ..deltaconv.distillation import in_place_of_attention, sample
    from ..nodes.host.conditioning import encode_prompts

    noise = torch.randn((12, 3, side, side), generator=torch.Generator().manual_seed(1))
    conditions = encode_prompts(teacher, TWELVE, None)
    (unconditional,) = encode_prompts(teacher, [""], None)
    visit = in_place_of_attention(blocks)
    pictures = sample(
        teacher, conditions, unconditional, noise, steps=STEPS, visit=visit, start=start
    )
    return pictures.clamp(-1, 1)
