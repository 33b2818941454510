"""Evaluate ΔConv weights against the model whose attention they replace."""

import re

import comfy.utils
import torch
from comfy_api.latest import io

from ..deltaconv.families import native_latent
from ..deltaconv.pictures.metrics import compare, side_by_side
from ..deltaconv.weights.compatibility import check_fit
from .host.pictures import decoded
from .node import Node
from .sockets import CATEGORY, DeltaConv


class DeltaConvEvaluate(Node):
    """MODEL, DELTACONV, conditioning, seeds → errors by noise level and site, pictures, figures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvEvaluate",
            display_name="Evaluate ΔConv",
            category=CATEGORY,
            description="Compare a model with its ΔConv weights to the model itself: the error of "
            "the predicted noise by noise level, of each layer alone, and PSNR, SSIM, LPIPS and "
            "CLIP score of pictures from equal seeds.",
            search_aliases=["ConvFusion evaluation", "psnr", "ssim", "lpips", "clip score"],
            inputs=[
                io.Model.Input("model", tooltip="Without ΔConv applied."),
                DeltaConv.Input("deltaconv", tooltip="The weights to judge."),
                io.Conditioning.Input(
                    "positive", tooltip="What to draw; several, combined or batched, are all drawn."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="None: CFG is left out."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the pictures. Without it only models that work in pixels get "
                    "PSNR, SSIM and a grid.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Only its size is used; none: the family's usual size.",
                ),
                io.String.Input("seeds", default="1, 2", tooltip="One picture per seed."),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="Of the pictures' sampling.",
                ),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Guidance of the pictures' sampling.",
                ),
                io.Int.Input(
                    "levels",
                    default=8,
                    min=1,
                    max=100,
                    advanced=True,
                    tooltip="At how many noise levels the predicted noise is compared.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="For the CLIP score: the text behind positive; with several "
                    "conditionings one line each. LPIPS and CLIP score are taken where their "
                    "libraries and weights are installed; nothing is downloaded.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="table"),
                io.Image.Output(display_name="plot"),
                io.Image.Output(display_name="grid"),
                io.Float.Output(display_name="mse", tooltip="Of the predicted noise, mean."),
                io.Float.Output(display_name="psnr", tooltip="Mean in dB; NaN without pictures."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        deltaconv,
        positive,
        negative=None,
        vae=None,
        latent=None,
        seeds: str = "1, 2",
        steps: int = 20,
        cfg: float = 4.0,
        levels: int = 8,
        prompts: str = "",
    ) -> io.NodeOutput:
        # Imported here: distillation would slow down the start of ComfyUI.
        from ..deltaconv.distillation.evaluation import evaluate
        from ..deltaconv.distillation.plots import level_plot
        from ..deltaconv.pictures.figure import picture
        from ..deltaconv.pictures.perceptual import perceptual_report
        from .host.conditioning import conditions_of
        from .host.teacher import ComfyTeacher

        numbers = _seeds(seeds)
        with torch.inference_mode(False), torch.no_grad():
            teacher = ComfyTeacher(model)
            check_fit(deltaconv, teacher.dims, teacher.family)
            blocks = deltaconv.blocks()
            conditions = conditions_of([positive])
            if not conditions:
                raise ValueError("Expected conditioning in positive, got an empty one.")
            texts = _texts(prompts, len(conditions))
            empty = conditions_of([negative])[0] if negative else conditions[0]
            bar = comfy.utils.ProgressBar(1)
            with teacher:
                result = evaluate(
                    teacher,
                    blocks,
                    conditions,
                    empty,
                    numbers,
                    _shape(teacher, latent),
                    steps=steps,
                    cfg=cfg if negative else 1.0,
                    levels=levels,
                    start=deltaconv.start,
                    progress=bar.update_absolute,
                )
                latents = [teacher.latents_out(x) for x in (result.teacher, result.student)]
        table, grid, psnr = result.report(), torch.ones(1, 64, 64, 3), float("nan")
        if pictures := _decode(latents, vae):
            comparison = compare(*pictures)
            captions = [comparison.caption(index) for index in range(len(comparison.psnr))]
            grid = side_by_side(*pictures, "self-attention", "DeltaConv", captions)
            # A picture per conditioning and seed, in this order.
            each = [text for text in texts for _ in numbers] or None
            table += f"\n\n{comparison.report()}\n{perceptual_report(*pictures, each)}"
            psnr = comparison.mean_psnr
        else:
            table += "\n\nConnect a VAE for PSNR, SSIM, LPIPS, CLIP score and the grid."
        plot = picture(lambda: level_plot(result))
        return io.NodeOutput(table, plot, grid, result.mse, psnr)


def _seeds(text: str) -> list[int]:
    words = re.split(r"[\s,;]+", text.strip(" \t\n,;"))
    if not all(re.fullmatch(r"\d{1,20}", word) and int(word) < 2**64 for word in words):
        raise ValueError(f"Expected seeds from 0 to 2^64 - 1 such as 1, 2, 3, got {text!r:.80}.")
    return [int(word) for word in words]


def _texts(prompts: str, conditions: int) -> list[str]:
    """One prompt per conditioning; [] where none is given."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if len(lines) > 1 and conditions == 1:
        lines = [" ".join(lines)]
    if lines and len(lines) != conditions:
        raise ValueError(
            f"Expected a line of prompts for each of {conditions} conditionings, got {len(lines)}."
        )
    return lines


def _shape(teacher, latent) -> tuple[int, int, int]:
    side = native_latent(teacher.family)
    # Core's empty latents have four channels, whatever the model has.
    size = latent["samples"].shape[-2:] if latent is not None else (side, side)
    return (teacher.patcher.model.latent_format.latent_channels, *size)


def _decode(latents, vae):
    """Two batches of pictures [B, H, W, 3] in 0…1; None without a VAE for latents."""
    if vae is not None:
        return [decoded(vae, latent) for latent in latents]
    if latents[0].shape[1] == 3:
        return [((latent + 1) / 2).clamp(0, 1).movedim(1, -1) for latent in latents]
    return None
