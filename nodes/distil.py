"""Distillation inside the graph: MODEL → ΔConv weights, watched live and resumable."""

import os
import time
from contextlib import closing
from math import isfinite
from pathlib import Path

import torch
from comfy_api.latest import io

from ..deltaconv.distil import (
    Dataset,
    DistilSettings,
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
from .conditioning import conditions_of, encode_prompts, latents_of
from .distil_preview import LivePreview
from .folders import output_folder
from .teacher import ComfyTeacher
from .types import CATEGORY, DeltaConv, LossMap, Recipe

_KERNELS = ("published, else by size", "by size")


class DeltaConvDistill(io.ComfyNode):
    """MODEL → DELTACONV, LOSS_MAP and a report; saves as it goes, and goes on where it stopped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        steps = {"min": 0, "max": 1_000_000}
        rate = {"min": 1e-7, "max": 1.0, "step": 1e-7}
        return io.Schema(
            node_id="DeltaConvDistill",
            display_name="Distill ΔConv",
            category=f"{CATEGORY}/training",
            description="Distill the self-attention of a model into ΔConvBlocks: first by least "
            "squares, then layer by layer, then as a whole. Train on latents with conditioning, or "
            "on prompts alone, for which the model's own samples are drawn. It saves as it goes; "
            "queue it again with the same folder to go on.",
            search_aliases=["ConvFusion training", "distil", "train deltaconv"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The teacher, with its LoRAs if it has any."),
                Recipe.Input(
                    "recipe",
                    optional=True,
                    tooltip="Which layers to replace, with which kernel; none: all, by the preset.",
                ),
                io.Combo.Input("kernels", options=list(_KERNELS), default=_KERNELS[0]),
                io.Latent.Input(
                    "latents", optional=True, tooltip="Images to train on, as core's trainers take."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="One caption for all latents, or one per latent. Without latents: "
                    "what to draw samples from.",
                ),
                io.Conditioning.Input(
                    "unconditional",
                    optional=True,
                    tooltip="The empty prompt. Without it no image is trained unconditionally.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One per line; used where no positive conditioning is connected.",
                ),
                io.Int.Input("layer_steps", default=300, **steps),
                io.Int.Input(
                    "joint_steps",
                    default=300,
                    tooltip="Steps of the whole student against the teacher. Needs memory for a "
                    "backward pass through the model, and ComfyUI 0.30.0 or newer.",
                    **steps,
                ),
                io.Int.Input("batch_size", default=8, min=1, max=4096),
                io.Float.Input("layer_rate", default=3e-3, **rate),
                io.Float.Input("joint_rate", default=1e-3, **rate),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Name of a folder in output/deltaconv/distillation: one that holds a "
                    "distillation of this model is gone on with. Empty: a new one.",
                ),
                io.Int.Input("save_every", default=100, min=1, max=1_000_000, advanced=True),
                io.Int.Input(
                    "preview_every",
                    default=100,
                    min=0,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Steps between preview pictures of teacher and student; 0: none.",
                ),
                io.Combo.Input(
                    "losses", options=["ours", "published"], default="ours", advanced=True
                ),
                io.Combo.Input(
                    "initialisation",
                    options=["informed", "random"],
                    default="informed",
                    advanced=True,
                ),
                io.Combo.Input(
                    "precision",
                    options=["float32", "bfloat16", "float16"],
                    default="float32",
                    advanced=True,
                    tooltip="Of the blocks' computation; their master weights are float32.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Joint stage: recompute the model's activations to save memory.",
                ),
                io.Int.Input("accumulate", default=1, min=1, max=4096, advanced=True),
                io.Int.Input(
                    "samples",
                    default=64,
                    min=1,
                    max=100_000,
                    advanced=True,
                    tooltip="How many own samples to draw where there are no latents.",
                ),
                io.Int.Input(
                    "sample_size",
                    default=0,
                    min=0,
                    max=16384,
                    advanced=True,
                    tooltip="Latent height and width of own samples; 0: the family's usual size.",
                ),
            ],
            outputs=[
                DeltaConv.Output(display_name="deltaconv"),
                LossMap.Output(display_name="loss_map"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, model, latents=None, positive=None, **inputs) -> io.NodeOutput:
        # Every input comes as a list; only these two are meant as one.
        one = {name: values[0] if values else None for name, values in inputs.items()}
        with torch.inference_mode(False), torch.enable_grad():
            settings = _settings(one)
            teacher = ComfyTeacher(
                model[0], differentiable=settings.joint.steps > 0, name=_name(model[0])
            )
            return _distil(teacher, settings, latents or [], positive or [], one)


def _distil(teacher, settings, latents, positive, one) -> io.NodeOutput:
    recipe = _recipe(teacher, one.get("recipe"), one["kernels"])
    family = FAMILIES.get(teacher.family)
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
            gate=family.gate if family else "scaled",
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
    losses = [r.loss for r in history if r.stage != "init" and r.losses and isfinite(r.loss)]
    report = distil_report(history, folder, time.monotonic() - started)
    return io.NodeOutput(weights, {"loss": losses or [history[-1].loss]}, report)


def _settings(one) -> DistilSettings:
    common = {
        "seed": one["seed"],
        "save_every": one["save_every"],
        "precision": one["precision"],
        "checkpointing": one["gradient_checkpointing"],
        "init": one["initialisation"],
    }
    batch = {"batch": one["batch_size"], "accumulate": min(one["accumulate"], one["batch_size"])}
    layers = StageSettings(one["layer_steps"], lr=one["layer_rate"], **batch)
    joint = StageSettings(one["joint_steps"], lr=one["joint_rate"], **batch)
    make = published_settings if one["losses"] == "published" else default_settings
    return make(**{**common, "layers": layers, "joint": joint})


def _recipe(teacher: ComfyTeacher, recipe, kernels: str) -> dict:
    if recipe is not None:
        return {path: (step.kernel, list(step.scales)) for path, step in recipe.replaced.items()}
    published = FAMILIES.get(teacher.family) if kernels == _KERNELS[0] else None
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
        settings = DistilSettings.from_mapping({**settings.to_mapping(), "unconditional": 0.0})
    unconditional = empty[0] if empty else conditions[0]
    if latents:
        return Dataset(latents_of(teacher, latents), conditions, unconditional), settings
    side = one["sample_size"] or (family.native_latent if family else 64)
    channels = teacher.patcher.model.latent_format.latent_channels
    names = [f"{entry[0].double().sum().item()!r}" for entry in conditions]
    dataset = own_samples(
        teacher,
        conditions,
        names,
        unconditional,
        (channels, side, side),
        count=one["samples"],
        cfg=4.0 if empty else 1.0,
        seed=one["seed"],
        batch=one["batch_size"],
        cache=Path(output_folder()) / "distillation" / "samples",
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
