"""What the distillation node does: inputs to data, settings and recipe, then the core's records."""

import logging
import os
import time
from contextlib import closing
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch

from ...deltaconv.distillation import (
    PRESETS,
    Dataset,
    StageSettings,
    default_kernels,
    distill,
    weights_of,
)
from ...deltaconv.distillation.checkpoint import saved_seed, saved_steps
from ...deltaconv.distillation.own_samples import own_samples
from ...deltaconv.distillation.report import DistillationReport
from ...deltaconv.families import FAMILIES, native_latent
from ...deltaconv.weights.compatibility import check_fit
from ..distill import KERNELS, LOSSES
from .conditioning import conditions_of, digest_of, encode_prompts, latents_of
from .folders import SAMPLES, output_folder
from .preview import LivePreview
from .teacher import ComfyTeacher

# Of the own samples, whatever the training's: going on under another seed draws none anew.
_SAMPLES_SEED = 0


def run(model, latents, positive, one) -> tuple:
    """The node's outputs: DELTACONV, LOSS_MAP and the report."""
    with torch.inference_mode(False), torch.enable_grad():
        settings = _settings(one)
        teacher = ComfyTeacher(model, differentiable=settings.joint.steps > 0, name=_name(model))
        return _distil(teacher, settings, latents, positive, one)


def _distil(teacher, settings, latents, positive, one) -> tuple:
    start = one.get("start")
    recipe = _recipe(teacher, one.get("recipe"), one["kernels"], start)
    family = FAMILIES.get(teacher.family)
    gate = start.gate if start else family.gate if family else "scaled"
    folder = state_folder(one["folder"])
    name = os.path.relpath(folder, _base())
    started = time.monotonic()
    # Before the teacher is loaded: a CLIP that needs its memory would push it out again.
    conditions, empty = _conditions(teacher, positive, one)
    if empty is None:
        settings = replace(settings, unconditional=0.0)
    preview, report = (
        LivePreview(teacher, settings, one["preview_every"], name),
        DistillationReport(),
    )
    given = latents_of(teacher, latents)

    def data() -> Dataset:
        preview.dataset = (
            Dataset(given, conditions, empty or conditions[0])
            if given
            else _own_samples(
                teacher,
                settings,
                conditions,
                empty,
                one,
                former_seed=saved_seed(folder),
                progress=preview.drawn,
                reused=lambda count: report.own_samples(one["samples"], count),
            )
        )
        return preview.dataset

    logging.info("ΔConv: distilling; queue again with folder %r to go on where it stops", name)
    try:
        records = distill(
            teacher,
            recipe,
            data,
            settings,
            gate=gate,
            start={site: start.block(site).float() for site in start.sites} if start else None,
            folder=folder,
            progress=preview.initialized,
        )
        # Closing saves: after an interrupt too, which comes as an exception out of the loop.
        with teacher, closing(records):
            for record in records:
                report.add(record)
                preview.show(record)
            weights = weights_of(record.student, teacher, settings, steps=len(record.history))
    except BaseException as error:
        preview.stopped(error, saved_steps(folder))
        raise
    losses = [loss for loss in record.history if isfinite(loss)]
    text = report.text(folder, time.monotonic() - started)
    return weights, {"loss": losses or [record.loss]}, text


def _settings(one):
    common = {
        "seed": one["seed"],
        "save_every": one["save_every"],
        "precision": one["precision"],
        "checkpointing": one["gradient_checkpointing"],
        "init": one["initialisation"],
        "min_snr": float(one.get("min_snr", 0.0)),
        "eight_bit": one.get("eight_bit", False),
    }
    layers, joint = _stage(one, "layer"), _stage(one, "joint")
    return PRESETS[LOSSES[one["losses"]]](**{**common, "layers": layers, "joint": joint})


def _stage(one, name: str) -> StageSettings:
    steps = one[f"{name}_steps"]
    return StageSettings(
        steps,
        lr=one[f"{name}_rate"],
        # A short run warms up for a tenth of its steps.
        warmup=min(20, steps // 10),
        batch=one["batch_size"],
        accumulate=min(one["accumulate"], one["batch_size"]),
    )


def _recipe(teacher: ComfyTeacher, recipe, kernels: str, start) -> dict:
    if start is not None:
        check_fit(start, teacher.dims, teacher.family)
    if recipe is not None:
        if not recipe.replaced:
            raise ValueError(
                "Expected a recipe that replaces a layer, got one that keeps them all. Change its "
                "text, or leave it out."
            )
        return {path: (step.kernel, list(step.scales)) for path, step in recipe.replaced.items()}
    if start is not None:
        return {
            site: (geometry.kernel_size, list(start.scales[site]))
            for site, geometry in start.sites.items()
        }
    published = FAMILIES.get(teacher.family) if kernels == KERNELS[0] else None
    by_size = default_kernels(teacher.model_sites.levels)
    return {
        site: (published and published.published_kernel(site)) or by_size[site]
        for site in teacher.dims
    }


def _conditions(teacher, positive, one) -> tuple[list, object | None]:
    """What to train with, and the empty prompt; None where there is no such."""
    conditions = conditions_of(positive)
    prompts = [line.strip() for line in (one["prompts"] or "").splitlines() if line.strip()]
    if not conditions and prompts:
        conditions = encode_prompts(teacher, prompts, one.get("clip"))
    if not conditions:
        raise ValueError(
            "Expected conditioning or prompts to train with, got neither. Connect positive, or "
            "write prompts and connect a CLIP."
        )
    empty = conditions_of([one["unconditional"]]) if one.get("unconditional") else []
    if not empty and (one.get("clip") is not None or not positive):
        empty = encode_prompts(teacher, [""], one.get("clip"))
    return conditions, empty[0] if empty else None


def _own_samples(teacher, settings, conditions, empty, one, **heard) -> Dataset:
    side = one["sample_size"] or native_latent(teacher.family)
    channels = teacher.patcher.model.latent_format.latent_channels
    layers, unconditional = settings.layers, empty or conditions[0]
    return own_samples(
        teacher,
        conditions,
        [digest_of(entry) for entry in conditions],
        unconditional,
        (channels, side, side),
        count=one["samples"],
        cfg=4.0 if empty else 1.0,
        seed=_SAMPLES_SEED,
        batch=-(-layers.batch // layers.accumulate),
        cache=_base() / SAMPLES,
        max_bytes=one.get("samples_mb", 1024) * 2**20,
        unconditional_name=digest_of(unconditional),
        **heard,
    )


def _base() -> Path:
    return Path(output_folder()) / "distillation"


def state_folder(name: str) -> Path:
    """The folder below output/deltaconv/distillation; an empty name makes a new numbered one."""
    base = _base()
    name = (name or "").strip()
    if not name:
        number = 1
        while (base / f"{number:05d}").exists():
            number += 1
        name = f"{number:05d}"
    folder = Path(os.path.abspath(base / name))
    if base.resolve() not in folder.resolve().parents:
        raise ValueError(
            f"Expected a folder name below {base}, got {name!r}. Leave out .. and absolute paths."
        )
    if folder == base / SAMPLES:
        raise ValueError(f"Expected a folder name, got {name!r}, where own samples are kept.")
    return folder


def _name(model) -> str:
    config = type(model.model.model_config).__name__
    patches = " with weight patches" if model.patches else ""
    return f"a {config} model{patches}"
