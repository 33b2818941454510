"""Presets: our default settings, the paper's, and those of the authors' code.

The paper and its authors' code (IrisRainbowNeko/ConvFusion) train differently, so each has its
preset. All of theirs start from random blocks, have no layers stage, and run AdamW at 3e-4, betas
0.9 and 0.99, constant after 500 steps. They trained in fp16, PixArt in bf16; `precision` is left to
the caller.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from .settings import Decayed, DistillationError, DistillationSettings, Loss, StageSettings

PAPER_LOSSES: dict[Loss, float] = {"noise": 1.0, "teacher": 1.0, "features": 0.001}
# Model → losses that have a gradient, steps, images per step, parts of these, whether in 8 bits.
_CODE: dict[str, tuple[dict[Loss, float], int, int, int, bool]] = {
    "SD1.5": ({"features": 0.001}, 60_000, 16, 1, False),
    "SDXL": (PAPER_LOSSES, 200_000, 8, 2, True),
    "PixArt": (PAPER_LOSSES, 200_000, 16, 1, False),
}


def default_settings(**changes: Any) -> DistillationSettings:
    """Our recipe: informed initialization, then the layers stage, then the joint stage.

    Chosen on the packaged demo model alone, in single runs of a few dozen steps: a joint rate of
    1e-3 undid the least-squares solution, and the features made little difference.
    """
    settings = DistillationSettings(
        layers=StageSettings(300, lr=1e-3, updates=8),
        joint=StageSettings(300, lr=3e-4, updates=4),
        losses={"teacher": 1.0, "normalised_features": 0.3},
    )
    return replace(settings, **changes)


def tokens_settings(**changes: Any) -> DistillationSettings:
    """Our recipe for blocks with pooled tokens: the first step of sampling is drawn more often.

    Ten times as often as the last, since pictures hang on errors there (docs/measurements.md). Only
    tried with such blocks.
    """
    return replace(default_settings(growth=10.0), **changes)


def paper_settings(**changes: Any) -> DistillationSettings:
    """As the paper says: MSE to the noise, to the teacher's prediction and 0.001 to its features.

    Weight decay 0.03; on which tensors is not known, so on all. A summary of the paper also names
    Min-SNR, γ = 5, which its loss does not show: `min_snr=5.0` adds it.
    """
    return replace(_theirs(PAPER_LOSSES, 60_000, 16, weight_decay=0.03), **changes)


def code_settings(model: str, **changes: Any) -> DistillationSettings:
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


def _theirs(
    losses: Mapping[Loss, float],
    steps: int,
    batch: int,
    parts: int = 1,
    *,
    weight_decay: float,
    decayed: Decayed = "all",
) -> DistillationSettings:
    stage = StageSettings(
        steps,
        lr=3e-4,
        schedule="constant",
        warmup=500,
        batch=batch,
        accumulate=parts,
        weight_decay=weight_decay,
        decayed=decayed,
    )
    return DistillationSettings(init="random", joint=stage, losses=dict(losses), unconditional=0.15)


# By the name in a configuration.
PRESETS: dict[str, Callable[..., DistillationSettings]] = {
    "default": default_settings,
    "tokens": tokens_settings,
    "paper": paper_settings,
    "code-sd15": partial(code_settings, "SD1.5"),
    "code-sdxl": partial(code_settings, "SDXL"),
    "code-pixart": partial(code_settings, "PixArt"),
}
# The former name of the paper's preset.
PRESETS["published"] = PRESETS["paper"]
