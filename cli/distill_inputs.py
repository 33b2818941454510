"""What a configuration names: the teacher, its pictures and captions, or its own samples.

ComfyUI must be on the path (`host.enter`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..deltaconv import demo
from ..deltaconv.distillation import Dataset, DistillationSettings
from ..deltaconv.distillation.engine import Engine
from ..deltaconv.families import native_latent
from . import CommandError
from .distill_config import Configuration

# Shared by all runs of this folder: drawing them takes longer than most of what follows.
SAMPLES = Path("output", "distill-samples")
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def load_teacher(
    configuration: Configuration, settings: DistillationSettings, *, joint: bool = False
):
    """The packaged demo teacher, or the checkpoint that the configuration names.

    Gradients pass through it for the joint steps of the settings, or where `joint` may get some.
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
            model, clip, vae = comfy.sd.load_checkpoint_guess_config(name)[:3]
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

    pixels = 8 if teacher.vae is not None else 1
    size = configuration.size or pixels * native_latent(teacher.family)
    if size < pixels:
        raise CommandError(f"Expected a size of {pixels} pixels or more, got {size}.")

    def encode(texts):
        return encode_prompts(teacher, list(map(str, texts)), teacher.clip)

    engine = engine or Engine()
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
        pictures, captions = read_folder(Path(configuration.data), size)
        latents = [_encode_picture(teacher, picture) for picture in pictures]
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


def read_folder(folder: Path, size: int) -> tuple[list[torch.Tensor], list[str]]:
    """Pictures [size, size, 3] in 0…1, cut to squares, and their captions from .txt files."""
    import numpy as np
    from PIL import Image, ImageOps

    if not folder.is_dir():
        raise CommandError(f"Expected a folder of pictures, got {folder}, which is none.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    if not files:
        raise CommandError(f"Expected pictures ({', '.join(_ENDINGS)}) in {folder}, got none.")
    pictures, captions = [], []
    for file in files:
        caption = file.with_suffix(".txt")
        try:
            picture = ImageOps.fit(Image.open(file).convert("RGB"), (size, size))
            captions.append(caption.read_text(encoding="utf-8").strip() if caption.exists() else "")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise CommandError(f"Cannot use {file}: {error}.") from error
        pictures.append(torch.from_numpy(np.array(picture, dtype=np.float32) / 255))
    return pictures, captions


def _encode_picture(teacher, picture: torch.Tensor) -> torch.Tensor:
    """[H, W, 3] in 0…1 → latent [C, h, w]: through the VAE, or as it is for a model in pixels."""
    samples = picture[None]
    if teacher.vae is not None:
        samples = teacher.vae.encode(samples)
    else:
        samples = samples.movedim(-1, 1) * 2 - 1
    return teacher.latents_in(samples)[0].float().cpu()
