"""What the distillation node does: inputs to data, settings and recipe, then the core's records."""

import os
import time
from contextlib import closing
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch

from ..deltaconv.distil import (
    Dataset,
    StageSettings,
    default_kernels,
    default_settings,
    distil,
    published_settings,
    weights_of,
)
from ..deltaconv.distil.own_samples import own_samples
from ..deltaconv.distil.report import distil_report
from ..deltaconv.families import FAMILIES
from ..deltaconv.fit import check_fit
from .conditioning import conditions_of, digest_of, encode_prompts, latents_of
from .distil import KERNELS
from .distil_preview import LivePreview
from .folders import output_folder
from .teacher import ComfyTeacher


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
    if settings.joint.steps and teacher.why_not_differentiable:
        raise ValueError(f"The joint stage cannot run: {teacher.why_not_differentiable}")
    started = time.monotonic()
    with teacher:
        dataset, settings = _dataset(teacher, settings, latents, positive, one, family)
        preview = LivePreview(teacher, dataset, settings, one["preview_every"])
        records = distil(
            teacher,
            recipe,
            dataset,
            settings,
            gate=gate,
            start={site: start.block(site).float() for site in start.sites} if start else None,
            folder=folder,
        )
        history = []
        # Closing saves: after an interrupt too, which comes as an exception out of the loop.
        with closing(records):
            for record in records:
                history.append(record)
                preview.show(record)
        weights = weights_of(
            history[-1].student, teacher, settings, steps=sum(bool(r.losses) for r in history)
        )
    losses = [loss for loss in history[-1].history if isfinite(loss)]
    report = distil_report(history, folder, time.monotonic() - started)
    return weights, {"loss": losses or [history[-1].loss]}, report


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
    make = published_settings if one["losses"] == "published" else default_settings
    return make(**{**common, "layers": layers, "joint": joint})


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


def _dataset(teacher, settings, latents, positive, one, family):
    """The data, and the settings with unconditional images left out where there is no such."""
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
    if not empty:
        settings = replace(settings, unconditional=0.0)
    unconditional = empty[0] if empty else conditions[0]
    if latents:
        return Dataset(latents_of(teacher, latents), conditions, unconditional), settings
    side = one["sample_size"] or (family.native_latent if family else 64)
    channels = teacher.patcher.model.latent_format.latent_channels
    layers = settings.layers
    dataset = own_samples(
        teacher,
        conditions,
        [digest_of(entry) for entry in conditions],
        unconditional,
        (channels, side, side),
        count=one["samples"],
        cfg=4.0 if empty else 1.0,
        seed=one["seed"],
        batch=-(-layers.batch // layers.accumulate),
        cache=Path(output_folder()) / "distillation" / "samples",
        max_bytes=one.get("samples_mb", 1024) * 2**20,
        unconditional_name=digest_of(unconditional),
    )
    return dataset, settings


def state_folder(name: str) -> Path:
    """The folder below output/deltaconv/distillation; an empty name makes a new numbered one."""
    base = Path(output_folder()) / "distillation"
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
    return folder


def _name(model) -> str:
    config = type(model.model.model_config).__name__
    patches = " with weight patches" if model.patches else ""
    return f"a {config} model{patches}"
