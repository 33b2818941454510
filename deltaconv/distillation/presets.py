"""Ready-made settings: our own recipe, the paper's, and what the authors' code does instead.

The paper and its authors' code (IrisRainbowNeko/ConvFusion) do not train alike, so each has a
preset of its own and none is called the published one. All of theirs begin at random blocks, have
no layer-by-layer stage, and run AdamW at 3e-4, betas 0.9 and 0.99, constant after 500 steps. They
trained in fp16, PixArt in bf16; `precision` is left to whoever runs these.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from .settings import DistillationError, DistillationSettings, StageSettings

PAPER_LOSSES = {"noise": 1.0, "teacher": 1.0, "features": 0.001}
# Model → losses that have a gradient, steps, images per step, parts of these, whether in 8 bits.
_CODE = {
    "SD1.5": ({"features": 0.001}, 60_000, 16, 1, False),
    "SDXL": (PAPER_LOSSES, 200_000, 8, 2, True),
    "PixArt": (PAPER_LOSSES, 200_000, 16, 1, False),
}


def default_settings(**changes: object) -> DistillationSettings:
    """Our recipe: informed initialization, then layer by layer, then the student's own path.

    Chosen on the packaged demo model alone, in single runs of a few dozen steps: a joint rate of
    1e-3 led away from what least squares found, and the features made little difference.
    """
    settings = DistillationSettings(
        layers=StageSettings(300, lr=1e-3),
        joint=StageSettings(300, lr=3e-4),
        losses={"teacher": 1.0, "normalised_features": 0.3},
    )
    return replace(settings, **changes)


def paper_settings(**changes: object) -> DistillationSettings:
    """As the paper says: MSE to the noise, to the teacher's prediction and 0.001 to its features.

    Weight decay 0.03; on which tensors is not known, so on all. A summary of the paper also names
    Min-SNR, γ = 5, which its loss does not show: `min_snr=5.0` adds it.
    """
    return replace(_theirs(PAPER_LOSSES, 60_000, 16, weight_decay=0.03), **changes)


def code_settings(model: str, **changes: object) -> DistillationSettings:
    """As the authors' code trains `model`, one of "SD1.5", "SDXL", "PixArt".

    Plain MSE without Min-SNR, and weight decay 0.01 on the weights of Linears alone.

    SD1.5: the features alone, at 0.001. Their wrapper puts the teacher's prediction in place of the
    student's, so both output losses are constants without a gradient; they are left out here, which
    leaves every gradient as it is. 60,000 steps by its configuration; the file is called 132000.
    SDXL: the paper's three losses, an 8-bit AdamW (`eight_bit`, needs bitsandbytes), 4 × 2 images.
    PixArt: the paper's three losses, 16 images.
    """
    if model not in _CODE:
        raise DistillationError(f"model: expected one of {tuple(_CODE)}, got {model!r:.40}.")
    losses, steps, batch, parts, eight_bit = _CODE[model]
    settings = _theirs(losses, steps, batch, parts, weight_decay=0.01, decayed="linear")
    return replace(settings, **{"eight_bit": eight_bit, **changes})


def _theirs(losses, steps: int, batch: int, parts: int = 1, **decay) -> DistillationSettings:
    stage = StageSettings(
        steps, lr=3e-4, schedule="constant", warmup=500, batch=batch, accumulate=parts, **decay
    )
    return DistillationSettings(init="random", joint=stage, losses=dict(losses), unconditional=0.15)


# By the name that a configuration gives.
PRESETS: dict[str, Callable[..., DistillationSettings]] = {
    "default": default_settings,
    "paper": paper_settings,
    "code-sd15": partial(code_settings, "SD1.5"),
    "code-sdxl": partial(code_settings, "SDXL"),
    "code-pixart": partial(code_settings, "PixArt"),
}
# The paper's until there were two.
PRESETS["published"] = PRESETS["paper"]
