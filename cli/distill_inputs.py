"""What a configuration names: the teacher, its pictures and captions, or its own samples.

ComfyUI must be on the path (`host.enter`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..deltaconv import DeltaConvWeights, demo, read_weights
from ..deltaconv.distillation import Dataset, DistillationSettings
from ..deltaconv.distillation.engine import Engine
from ..deltaconv.families import native_latent
from ..deltaconv.weights.compatibility import check_fit
from . import CommandError
from .distill_config import Configuration

# Shared by all runs of this folder: drawing them takes longer than most of what follows.
SAMPLES = Path("output", "distill-samples")


def load_teacher(
    configuration: Configuration,
    settings: DistillationSettings,
    *,
    joint: bool = False,
    encoders: bool = True,
):
    """The packaged demo teacher, or the checkpoint that the configuration names.

    Gradients pass through it for the joint steps of the settings, or where `joint` may get some.
    Without `encoders` neither CLIP nor VAE is loaded.
    """
    from ..nodes.host.demo_model import load_demo_model
    from ..nodes.host.teacher import ComfyTeacher

    name = configuration.model
    if name == "demo":
        model, title = load_demo_model(), f"the packaged demo ({demo.TEACHER_PATH.name})"
        clip = vae = None
    else:
        import comfy.sd

        if not Path(name).is_file():
            raise CommandError(f"Expected a checkpoint, got {name}, which is not there.")
        try:
            model, clip, vae = comfy.sd.load_checkpoint_guess_config(
                name, output_vae=encoders, output_clip=encoders
            )[:3]
        except Exception as error:
            # Whatever its loaders raise for a file that is damaged or of no known model.
            raise CommandError(f"ComfyUI cannot load {name}: {error!s:.200}.") from error
        if model is None:
            raise CommandError(f"Expected a diffusion model in {name}, got none.")
        title = Path(name).name
    differentiable = joint or settings.joint.steps > 0
    teacher = ComfyTeacher(model, differentiable=differentiable, name=title)
    teacher.clip, teacher.vae = clip, vae
    return teacher


def chosen_blocks(
    configuration: Configuration, teacher
) -> tuple[DeltaConvWeights | None, Mapping[str, object], str]:
    """The weights to go on from, if any, what to put in place of which layer, and the gate."""
    from ..deltaconv.distillation import default_kernels, plans_with_tokens

    recipe = configuration.recipe
    if configuration.start is not None:
        name = configuration.start
        start = read_weights(demo.DELTACONV_PATH if name == "packaged" else Path(name))
        check_fit(start, teacher.dims, teacher.family)
        return start, recipe or start.plans, start.gate
    if not recipe and configuration.kernels == "by size":
        recipe = default_kernels(teacher.model_sites.levels)
    elif not recipe:
        recipe = plans_with_tokens(teacher)
    return None, recipe, configuration.gate


@dataclass(frozen=True)
class Inputs:
    """A data set, or a function that makes it, and what is known of it before.

    `shape` is that of its first latent, [C, H, W].
    """

    data: Dataset | Callable[[], Dataset]
    conditions: Sequence
    unconditional: object
    shape: tuple[int, ...]


def chosen_data(configuration: Configuration, teacher):
    """The demo's pictures or a folder's; of prompts a function that draws the teacher's samples."""
    return chosen_inputs(configuration, teacher).data


def chosen_inputs(
    configuration: Configuration,
    teacher,
    enough: Callable[[int], bool] = lambda drawn: False,
    engine: Engine | None = None,
) -> Inputs:
    """What `chosen_data` gives, with its conditions; `enough` ends the drawing of samples.

    The first process of several draws them; the others read its samples.
    """
    from ..deltaconv.distillation.own_samples import own_samples
    from ..nodes.host.conditioning import encode_prompts

    def encode(texts):
        return encode_prompts(teacher, list(map(str, texts)), teacher.clip)

    engine = engine or Engine()
    if configuration.store:
        return _stored(configuration, teacher)
    pixels, size = _pixels(teacher), picture_size(configuration, teacher)
    (unconditional,) = encode([""])
    prompts = configuration.prompts
    if configuration.data == "demo" and teacher.family == demo.FAMILY and not prompts:
        prompts = _prompts_in_place_of_pictures(configuration)
    if prompts:
        channels = teacher.patcher.model.latent_format.latent_channels
        shape, conditions = (channels, size // pixels, size // pixels), encode(prompts)
        draw = partial(
            own_samples,
            teacher,
            conditions,
            list(map(str, prompts)),
            unconditional,
            shape,
            count=configuration.samples,
            cache=SAMPLES,
            progress=_say_tenths if engine.main else lambda done, total: None,
        )

        def data() -> Dataset:
            if engine.alone:
                return draw(enough=enough)
            count = engine.shared(lambda: len(draw(enough=enough).latents))
            return draw(enough=lambda drawn: drawn >= count)

        return Inputs(data, conditions, unconditional, shape)
    if configuration.data == "demo":
        if teacher.family != demo.FAMILY:
            raise CommandError("Expected data or prompts for a model of your own, got neither.")
        pictures, captions = demo.pictures()
        latents = list(pictures)
    else:
        sizes = picture_sizes(configuration, teacher)
        pictures, captions = read_pictures(configuration, sizes)
        latents = [encode_picture(teacher, picture) for picture in pictures]
    data = Dataset(latents, encode(captions), unconditional)
    return Inputs(data, data.conditions, unconditional, tuple(latents[0].shape))


def _prompts_in_place_of_pictures(configuration: Configuration) -> list[str]:
    """Captions of the demo where its pictures, which archives leave out, are missing; else []."""
    if demo.PICTURES_PATH.is_file():
        return []
    captions = demo.captions()
    # From all over the list, which goes by kind.
    chosen = captions[:: max(1, len(captions) // configuration.samples)][: configuration.samples]
    print(
        f"The demo's training pictures are in the pack's repository alone: {len(chosen)} samples "
        "of its own are drawn in their place.",
        flush=True,
    )
    return chosen


def _say_tenths(done: int, total: int) -> None:
    if 10 * done // total > 10 * (done - 1) // total:
        print(f"own samples: {done / total:.0%}", flush=True)


def _stored(configuration: Configuration, teacher) -> Inputs:
    from ..deltaconv.scale.store import StoredData, is_store

    folder = Path(configuration.store or "")
    if not is_store(folder):
        raise CommandError(
            f"Expected a store in {folder}, got none. Make it with deltaconv precompute and the "
            "same configuration, or leave the entry store out."
        )
    data = StoredData(
        folder,
        base=teacher.fingerprint,
        corrupt=configuration.corrupt,
        workers=configuration.workers,
    )
    if data.skipped:
        print(f"{len(data.skipped)} of {len(data) + len(data.skipped)} items were skipped.")
    # What is asked before the training: the pace of a call, and a choice of layers.
    return Inputs(data, data.conditions[:8], data.unconditional, tuple(data.latents[0].shape))


def _pixels(teacher) -> int:
    """Pixels of a picture per cell of its latent, in width or height."""
    return 8 if teacher.vae is not None else 1


def picture_size(configuration: Configuration, teacher) -> int:
    """The side of the square that has as many pixels as each picture is cut to."""
    pixels = _pixels(teacher)
    size = configuration.size or pixels * native_latent(teacher.family)
    if size < pixels:
        raise CommandError(f"Expected a size of {pixels} pixels or more, got {size}.")
    return size


def picture_sizes(configuration: Configuration, teacher) -> list[tuple[int, int]]:
    """(width, height) that pictures are cut to: the square alone, or the buckets."""
    from ..deltaconv.scale.buckets import buckets

    size = picture_size(configuration, teacher)
    # Sides that every level of a model halves.
    return buckets(size, 8 * _pixels(teacher)) if configuration.buckets else [(size, size)]


def read_pictures(
    configuration: Configuration, sizes: Sequence[tuple[int, int]]
) -> tuple[list[torch.Tensor], list[str]]:
    """Pictures [H, W, 3] in 0…1 of the data, cut to the nearest of `sizes`, and their captions."""
    from ..deltaconv.scale.sources import Corruption

    source, corruption = source_of(configuration), Corruption(configuration.corrupt)
    pictures, captions = [], []
    try:
        for part in range(source.parts):
            for item in source.items(part):
                if found := corruption.read(item):
                    pictures.append(cut(found[0], sizes))
                    captions.append(found[1])
        corruption.check()
    except ValueError as error:
        raise CommandError(str(error)) from error
    if corruption.skipped:
        print(f"{corruption}: {', '.join(corruption.skipped)}.", flush=True)
    if not pictures:
        raise CommandError(f"Expected readable pictures in {configuration.data}, got none.")
    return pictures, captions


def source_of(configuration: Configuration):
    """The captioned pictures that the entry `data` names."""
    from ..deltaconv.scale.sources import pictures_of

    try:
        return pictures_of(configuration.data)
    except ValueError as error:
        raise CommandError(str(error)) from error


def cut(picture, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """A Pillow picture → [H, W, 3] in 0…1, scaled and cut to the nearest of `sizes`."""
    import numpy as np
    from PIL import ImageOps

    from ..deltaconv.scale.buckets import nearest

    fitted = ImageOps.fit(picture, nearest(*picture.size, list(sizes)))
    return torch.from_numpy(np.array(fitted, dtype=np.float32) / 255)


def encode_picture(teacher, picture: torch.Tensor) -> torch.Tensor:
    """[H, W, 3] in 0…1 → latent [C, h, w]: through the VAE, or as it is for a model in pixels."""
    samples = picture[None]
    if teacher.vae is not None:
        samples = teacher.vae.encode(samples)
    else:
        samples = samples.movedim(-1, 1) * 2 - 1
    return teacher.latents_in(samples)[0].float().cpu()
