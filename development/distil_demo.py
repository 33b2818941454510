"""What `python dev.py demo --distil` runs: the demo teacher distilled in a few minutes on a CPU."""

import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

PROMPTS = ("red apple", "sun with face", "tiger face", "octopus")
# Of the pictures; few, since the time goes to the distillation.
PICTURE_STEPS = 15
LAYER_STEPS, JOINT_STEPS = 60, 40
COLUMNS = ("teacher", "untrained", "initialised", "distilled")


def distil_demo(output: Path, layers: int = LAYER_STEPS, joint: int = JOINT_STEPS) -> dict:
    """Distil the demo teacher, print how the loss falls, write grid, curve and weights.

    ComfyUI must be on the path (`host.enter`). The grid's columns are `COLUMNS`: untrained blocks
    are random, initialised ones come from least squares alone. Returns PSNR in dB by column.
    """
    from dataclasses import replace

    from ..deltaconv import write_weights
    from ..deltaconv.distil import default_kernels, default_settings, distil, weights_of
    from ..deltaconv.distil.plots import loss_curve
    from ..deltaconv.distil.settings import new_blocks, read_plan
    from .distil import chosen_data, line_of, load_teacher

    base = default_settings()
    settings = replace(
        base,
        layers=replace(base.layers, steps=layers),
        joint=replace(base.joint, steps=joint),
        ema=0.9,
    )
    started = time.monotonic()
    teacher = load_teacher({}, settings)
    output.mkdir(parents=True, exist_ok=True)
    with teacher:
        recipe = default_kernels(teacher.model_sites.levels)
        blocks = new_blocks(read_plan(recipe, teacher.dims), teacher.dims, "scaled")
        pictures = {"teacher": draw(teacher, {}), "untrained": draw(teacher, blocks)}
        losses = []
        records = distil(teacher, recipe, chosen_data({}, teacher), settings)
        with closing(records):
            for record in records:
                if record.stage == "init":
                    pictures["initialised"] = draw(teacher, record.student.averaged_blocks())
                else:
                    losses.append((record.stage, record.loss))
                if record.step % 10 == 0 or record.step == 1:
                    print(line_of(record, time.monotonic() - started), flush=True)
        pictures["distilled"] = draw(teacher, record.student.averaged_blocks())
        weights = weights_of(record.student, teacher, settings)
    figures = {name: psnr(pictures["teacher"], pictures[name]) for name in COLUMNS[1:]}
    sheet(pictures, figures).save(output / "distil_demo.png")
    if curve := loss_curve(losses):
        curve.save(output / "distil_demo_loss.png")
    write_weights(weights, output / "distil_demo.safetensors", overwrite=True)
    for name, value in figures.items():
        print(f"{name:12} PSNR {value:5.1f} dB to the teacher, mean of {len(PROMPTS)}")
    print(f"{time.monotonic() - started:.0f} s in all. Grid: {output / 'distil_demo.png'}")
    return figures


def draw(teacher, blocks: Mapping):
    """Pictures [B, 3, 64, 64] of the prompts, from equal noise; no blocks: the teacher's own."""
    import torch

    from ..deltaconv.distil import sample
    from ..nodes.conditioning import encode_prompts

    def student(site, x, attend):
        return blocks[site](x.float()).to(x.dtype) if site in blocks else attend()

    noise = torch.randn((len(PROMPTS), 3, 64, 64), generator=torch.Generator().manual_seed(1))
    (unconditional,) = encode_prompts(teacher, [""], None)
    latents = sample(
        teacher,
        encode_prompts(teacher, PROMPTS, None),
        unconditional,
        noise,
        steps=PICTURE_STEPS,
        visit=student if blocks else None,
    )
    return latents.clamp(-1, 1).cpu()


def psnr(a, b) -> float:
    """Mean over pictures [B, C, H, W] in −1…1, in dB."""
    errors = (a - b).square().flatten(1).mean(1).clamp_min(1e-12)
    return (10 * (4 / errors).log10()).mean().item()


def sheet(pictures: Mapping, figures: Mapping[str, float]):
    """One row per prompt, one labelled column per stage."""
    from PIL import Image, ImageDraw

    from ..deltaconv.compare import to_pil

    tile, margin, top = 192, 12, 28
    width = margin + len(COLUMNS) * (tile + margin)
    page = Image.new("RGB", (width, top + len(PROMPTS) * (tile + margin)), "white")
    text = ImageDraw.Draw(page)
    for column, name in enumerate(COLUMNS):
        left = margin + column * (tile + margin)
        caption = f"{name}, {figures[name]:.1f} dB" if name in figures else name
        text.text((left, 8), caption, "black")
        for row, picture in enumerate(pictures[name]):
            image = to_pil((picture.movedim(0, -1) + 1) / 2)
            image = image.resize((tile, tile), Image.Resampling.NEAREST)
            page.paste(image, (left, top + row * (tile + margin)))
    return page
