"""What `python dev.py demo --distill` runs: the demo teacher distilled in a few minutes on a CPU.

The time is fixed and the work adapts: pictures, initialization and steps are planned from what one
call and one step take on this machine.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

PROMPTS = ("red apple", "sun with face", "tiger face", "octopus")
COLUMNS = ("teacher", "untrained", "initialised", "distilled")
# Of the six minutes that the command may take; the rest is for starting ComfyUI.
SECONDS = 310.0
_BATCH = 8


@dataclass(frozen=True)
class Pace:
    """Seconds of one call of teacher and student for all pictures of the grid."""

    teacher: float
    student: float

    def picture_steps(self, seconds: float) -> int:
        """Steps at which the grid's columns, one by the teacher, take a fifth of the time."""
        column = self.teacher + (len(COLUMNS) - 1) * self.student
        # Two calls a step, with the prompt and without.
        return max(6, min(20, int(seconds / 5 / (2 * column))))

    def init_images(self, seconds: float) -> int:
        """Images at which the initialization, which sees each twice, takes an eighth of it."""
        per_image = 2 * self.teacher / len(PROMPTS)
        batches = int(seconds / 8 / per_image / _BATCH)
        return _BATCH * max(4, min(16, batches))


def distill_demo(output: Path, seconds: float = SECONDS, side: int = 64) -> dict:
    """Distill the demo teacher within `seconds`, print how the loss falls, write grid and curve.

    ComfyUI must be on the path (`cli.host.enter`). The grid's columns are `COLUMNS`: untrained
    blocks are random, initialized ones come from least squares alone, both in every layer and step;
    distilled ones act in the layers and steps of the balanced choice, and are trained for those.
    `side` is that of all pictures in pixels. Returns {"psnr": dB by column, "mse": error on
    held-out noise by stage}.
    """
    from ..cli.distill import line_of
    from ..cli.distill_config import Configuration
    from ..cli.distill_inputs import load_teacher
    from ..deltaconv import write_weights
    from ..deltaconv.distillation import default_kernels, default_settings, distill, weights_of
    from ..deltaconv.distillation.plan import steps_within, with_steps
    from ..deltaconv.distillation.plots import error_curve
    from ..deltaconv.distillation.settings import read_plan
    from ..nodes.host.distill_choice import chooser

    started = time.monotonic()
    settings = with_steps(default_settings(ema=0.9), 0, 0)
    settings = replace(
        settings,
        layers=replace(settings.layers, batch=_BATCH),
        joint=replace(settings.joint, batch=_BATCH),
    )
    teacher = load_teacher(Configuration(), settings, joint=True)
    output.mkdir(parents=True, exist_ok=True)
    plans = read_plan(default_kernels(teacher.model_sites.levels), teacher.dims)
    data = demo_data(teacher, side)
    choose = chooser(
        teacher.patcher,
        teacher,
        plans,
        "scaled",
        (3, side, side),
        conditions=data.conditions,
        unconditional=data.unconditional,
        wanted="balanced",
        seed=0,
        said=lambda sentence: print(sentence, flush=True),
    )
    with teacher, _fastest_threads(teacher, side):
        blocks = _untrained(teacher, plans)
        pace = Pace(*(_seconds_of_a_call(teacher, b, side) for b in ({}, blocks)))
        steps = pace.picture_steps(seconds)
        print(f"Pictures of {steps} steps; teacher, then untrained blocks …", flush=True)
        since = time.monotonic()
        pictures = {"teacher": draw(teacher, {}, steps, side)}
        # A column more is drawn at the end, by both in parts, and two errors measured.
        reserve = 1.2 * (time.monotonic() - since) + 12 * (pace.teacher + pace.student) + 5
        pictures["untrained"] = draw(teacher, blocks, steps, side)
        errors = []

        def measure(name, blocks):
            errors.append((name, time.monotonic() - started, _error(teacher, blocks, data)))

        def plan(pace, settings):
            left = started + seconds - reserve - time.monotonic()
            return steps_within(settings, pace, left)

        measure("untrained", blocks)
        settings = replace(settings, init_images=pace.init_images(seconds))
        print(f"Least squares on {settings.init_images} images …", flush=True)
        with closing(distill(teacher, plans, data, settings, choose=choose, plan=plan)) as records:
            for record in records:
                student = record.student
                if record.stage == "init":
                    pictures["initialised"] = draw(teacher, student.averaged_blocks(), steps, side)
                    measure("least squares", student.averaged_blocks())
                    if choose:
                        print("Layers and steps are chosen …", flush=True)
                elif record.stage == "choice":
                    measure("chosen", student.averaged_blocks())
                elif record.message or record.step % 10 == 0 or record.step in (1, record.steps):
                    print(line_of(record, time.monotonic() - started), flush=True)
                over = time.monotonic() > started + seconds - reserve
                if over and record.step < record.steps:
                    print("The machine became slower than it was measured: stopped here.")
                    break
        blocks = record.student.averaged_blocks()
        pictures["distilled"] = draw(teacher, blocks, steps, side, record.student.start)
        measure("trained", blocks)
        weights = weights_of(record.student, teacher, record.settings)
    figures = {name: mean_psnr(pictures["teacher"], pictures[name]) for name in COLUMNS[1:]}
    drawn_sheet(pictures, figures).save(output / "distil_demo.png")
    if curve := error_curve(errors):
        curve.save(output / "distil_demo_loss.png")
    write_weights(weights, output / "distil_demo.safetensors", overwrite=True)
    for name, value in figures.items():
        print(f"{name:12} PSNR {value:5.1f} dB to the teacher, mean of {len(PROMPTS)}")
    for name, _, error in errors:
        print(f"{name:14} mse of the predicted noise on held-out noise {error:.5f}")
    print(f"{time.monotonic() - started:.0f} s in all. Grid: {output / 'distil_demo.png'}")
    return {"psnr": figures, "mse": {name: error for name, _, error in errors}}


def demo_data(teacher, side: int):
    """The demo's pictures with their captions, at `side` pixels."""
    import torch

    from ..cli.distill_config import Configuration
    from ..cli.distill_inputs import chosen_data

    data = chosen_data(Configuration(), teacher)
    native = data.latents[0].shape[-1]
    if side != native:
        mode = "area" if side < native else "bicubic"
        pictures = torch.nn.functional.interpolate(
            torch.stack(list(data.latents)), (side, side), mode=mode
        )
        data = replace(data, latents=list(pictures.clamp(-1, 1)))
    return data


def _untrained(teacher, plans: Mapping) -> dict:
    import torch

    from ..deltaconv.distillation.settings import new_blocks

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_blocks(plans, teacher.dims, "scaled")


@contextmanager
def _fastest_threads(teacher, side: int) -> Iterator[None]:
    """One thread where that is faster: several wait for each other on cores that others use."""
    import torch

    before = torch.get_num_threads()
    seconds = {}
    for threads in dict.fromkeys((before, 1)):
        torch.set_num_threads(threads)
        seconds[threads] = _seconds_of_a_call(teacher, {}, side)
    torch.set_num_threads(min(seconds, key=seconds.get))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds_of_a_call(teacher, blocks: Mapping, side: int) -> float:
    """The lesser of two: the first call of a kind allocates."""
    import torch

    from ..deltaconv.distillation import in_place_of_attention
    from ..nodes.host.conditioning import encode_prompts

    conditions = encode_prompts(teacher, PROMPTS, None)
    x, times = torch.zeros(len(PROMPTS), 3, side, side), []
    for _ in range(2):
        since = time.monotonic()
        with torch.no_grad():
            teacher.predict(x, torch.ones(len(PROMPTS)), conditions, in_place_of_attention(blocks))
        times.append(time.monotonic() - since)
    return min(times)


def _error(teacher, blocks: Mapping, data) -> float:
    """Mse of the predicted noise on 16 images of held-out noise."""
    from ..deltaconv.distillation.evaluation import held_out_error

    return held_out_error(teacher, blocks, data, batches=2)


def draw(teacher, blocks: Mapping, steps: int, side: int, start: float = 0.0):
    """Pictures [B, 3, H, W] of the prompts, from equal noise, with blocks from `start` on.

    No blocks: the teacher's own.
    """
    import torch

    from ..deltaconv.distillation import in_place_of_attention, sample
    from ..nodes.host.conditioning import encode_prompts

    generator = torch.Generator().manual_seed(1)
    noise = torch.randn((len(PROMPTS), 3, side, side), generator=generator)
    (unconditional,) = encode_prompts(teacher, [""], None)
    conditions = encode_prompts(teacher, PROMPTS, None)
    visit = in_place_of_attention(blocks)
    latents = sample(
        teacher, conditions, unconditional, noise, steps=steps, visit=visit, start=start
    )
    return latents.clamp(-1, 1).cpu()


def mean_psnr(a, b) -> float:
    """Mean over pictures [B, C, H, W] in −1…1, in dB."""
    from ..deltaconv.pictures.metrics import psnr

    return mean(psnr((a + 1) / 2, (b + 1) / 2))


def drawn_sheet(pictures: Mapping, figures: Mapping[str, float]):
    """One labelled row per prompt, one labelled column per stage."""
    from ..deltaconv.pictures.convert import to_pil
    from ..deltaconv.pictures.sheet import sheet

    rows = [
        [to_pil((picture.movedim(0, -1) + 1) / 2) for picture in row]
        for row in zip(*(pictures[name] for name in COLUMNS), strict=True)
    ]
    titles = [f"{name}, {figures[name]:.1f} dB" if name in figures else name for name in COLUMNS]
    return sheet(rows, columns=titles, names=PROMPTS, tile=192)
