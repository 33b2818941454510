"""The distillation node's work: inputs to data, settings and recipe; records to outputs."""

import logging
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from ...deltaconv.distillation import (
    Dataset,
    DistillationSettings,
    Record,
    default_kernels,
    distill,
    plans_with_tokens,
    weights_of,
)
from ...deltaconv.distillation.checkpoint import saved_seed, saved_steps
from ...deltaconv.distillation.choice import FASTEST
from ...deltaconv.distillation.own_samples import own_samples
from ...deltaconv.distillation.report import DistillationReport
from ...deltaconv.families import FAMILIES, native_latent
from ...deltaconv.geometry import BlockPlan
from ...deltaconv.weights.compatibility import check_fit
from .conditioning import conditions_of, digest_of, encode_prompts, latents_of
from .distill_choice import chooser
from .distill_inputs import DistillInputs
from .distill_time import TimeBudget
from .folders import SAMPLES, output_folder
from .preview import LivePreview
from .teacher import ComfyTeacher

# Apart from the training's seed, so that resuming under another one reuses the own samples.
_SAMPLES_SEED = 0
_FEW = 2


def run(model, inputs: DistillInputs) -> tuple:
    """The node's outputs: DELTACONV, LOSS_MAP and the report."""
    with torch.inference_mode(False), torch.enable_grad():
        settings = inputs.settings()
        joint = bool(settings.joint.steps or inputs.minutes)
        teacher = ComfyTeacher(model, differentiable=joint, name=_name(model))
        return _distil(model, teacher, settings, inputs)


def _distil(
    model, teacher: ComfyTeacher, settings: DistillationSettings, inputs: DistillInputs
) -> tuple:
    options, budget = inputs.options, TimeBudget(60 * inputs.minutes)
    start, recipe = options.start, _recipe(teacher, inputs)
    family = FAMILIES.get(teacher.family)
    gate = start.gate if start else family.gate if family else "scaled"
    folder = state_folder(inputs.folder)
    name = os.path.relpath(folder, _base())
    # Before the teacher is loaded: a CLIP that needs its memory would push it out again.
    conditions, empty = _conditions(teacher, inputs)
    if empty is None:
        settings = settings.unguided()
    # A recipe says from where blocks act, else what they go on from.
    if acting := options.recipe or start:
        settings = replace(settings, start=acting.start)
    report = DistillationReport()
    preview = LivePreview(teacher, options.preview_every, name, planned=bool(budget))
    given = latents_of(teacher, inputs.latents)
    shape = given[0].shape if given else _sample_shape(teacher, inputs)
    choice = None
    # A recipe, and weights to go on from, are a choice already.
    if inputs.choice != FASTEST and options.recipe is None and start is None:
        choice = chooser(
            model,
            teacher,
            recipe,
            gate,
            tuple(shape),
            conditions=conditions,
            unconditional=empty,
            wanted=inputs.choice,
            seed=_SAMPLES_SEED,
            said=report.chosen,
            progress=preview.choosing,
        )

    def data() -> Dataset:
        preview.dataset = (
            Dataset(given, conditions, empty or conditions[0])
            if given
            else _own_samples(
                teacher,
                settings,
                conditions,
                empty,
                inputs,
                former_seed=saved_seed(folder),
                progress=preview.drawn,
                reused=report.own_samples,
                enough=budget.enough_samples,
            )
        )
        return preview.dataset

    def distilled(settings: DistillationSettings) -> Iterator[Record]:
        return distill(
            teacher,
            recipe,
            data,
            settings,
            gate=gate,
            start=start.blocks() if start else None,
            choose=choice,
            plan=budget.plan if budget else None,
            folder=folder,
            progress=preview.initialized,
        )

    logging.info("ΔConv: distilling; queue again with folder %r to go on where it stops", name)
    try:
        # Refused before the teacher is loaded.
        records = distilled(settings)
        # Closing saves, after an interrupt too: it comes as an exception out of the loop.
        with teacher:
            if budget:
                records = distilled(budget.fitted(settings, teacher, conditions, tuple(shape)))
            with closing(records):
                for record in records:
                    report.add(record)
                    preview.show(record)
                    if budget.over and record.step < record.steps:
                        report.out_of_time(record)
                        break
            weights = weights_of(
                record.student, teacher, record.settings, steps=len(record.history)
            )
    except BaseException as error:
        preview.stopped(error, saved_steps(folder))
        raise
    losses = [loss for loss in record.history if isfinite(loss)]
    text = report.text(folder, budget.spent)
    return weights, {"loss": losses or [record.loss]}, text


def _recipe(teacher: ComfyTeacher, inputs: DistillInputs) -> dict[str, BlockPlan]:
    recipe, start = inputs.options.recipe, inputs.options.start
    if start is not None:
        check_fit(start, teacher.dims, teacher.family)
    if recipe is not None:
        if not recipe.replaced:
            raise ValueError(
                "Expected a recipe that replaces a layer, got one that keeps them all. Change its "
                "text, or leave it out."
            )
        return recipe.replaced
    if start is not None:
        return start.plans
    if inputs.tokens:
        return plans_with_tokens(teacher)
    published = FAMILIES.get(teacher.family) if inputs.published else None
    by_size = default_kernels(teacher.model_sites.levels)
    return {
        site: BlockPlan((published and published.published_kernel(site)) or by_size[site])
        for site in teacher.dims
    }


def _conditions(teacher: ComfyTeacher, inputs: DistillInputs) -> tuple[list, object | None]:
    """The conditions to train with, and the empty prompt; None where neither input gives it."""
    positive, unconditional = inputs.options.positive, inputs.options.unconditional
    conditions = conditions_of(positive)
    prompts = [line.strip() for line in inputs.prompts.splitlines() if line.strip()]
    if not conditions and prompts:
        conditions = encode_prompts(teacher, prompts, inputs.clip)
    if not conditions:
        raise ValueError(
            "Expected prompts to train with, got none. Write one per line and connect a CLIP, or "
            "connect conditioning to ΔConv Distillation Settings."
        )
    empty = conditions_of([unconditional]) if unconditional else []
    if not empty and (inputs.clip is not None or not positive):
        empty = encode_prompts(teacher, [""], inputs.clip)
    return conditions, empty[0] if empty else None


def _own_samples(
    teacher: ComfyTeacher,
    settings: DistillationSettings,
    conditions: list,
    empty: object | None,
    inputs: DistillInputs,
    **heard: Any,
) -> Dataset:
    layers, unconditional = settings.layers, empty or conditions[0]
    # Within a time a batch must not take all of it: on a CPU few images are as fast per image.
    few = inputs.minutes and teacher.device.type == "cpu"
    return own_samples(
        teacher,
        conditions,
        [digest_of(entry) for entry in conditions],
        unconditional,
        _sample_shape(teacher, inputs),
        count=inputs.options.samples,
        cfg=4.0 if empty else 1.0,
        seed=_SAMPLES_SEED,
        batch=_FEW if few else -(-layers.batch // layers.accumulate),
        cache=_base() / SAMPLES,
        max_bytes=inputs.options.samples_mb * 2**20,
        unconditional_name=digest_of(unconditional),
        predicted=bool(settings.losses.get("guided")),
        **heard,
    )


def _sample_shape(teacher: ComfyTeacher, inputs: DistillInputs) -> tuple[int, int, int]:
    side = inputs.options.sample_size or native_latent(teacher.family)
    return (teacher.patcher.model.latent_format.latent_channels, side, side)


def _base() -> Path:
    return Path(output_folder()) / "distillation"


def state_folder(name: str) -> Path:
    """The folder below output/deltaconv/distillation; an empty name makes a new numbered one."""
    base = _base()
    name = name.strip()
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
