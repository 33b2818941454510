"""Two sets of pictures side by side: how far apart they are, and one picture that shows it."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_MIN_TILE = 256
_MARGIN = 16


@dataclass(frozen=True)
class Comparison:
    """PSNR in dB and SSIM of every pair, and what could not be computed, in words.

    Identical pictures have a PSNR of inf; `ssim` is None where the library is missing.
    """

    psnr: list[float]
    ssim: list[float] | None

    @property
    def mean_psnr(self) -> float:
        return sum(self.psnr) / len(self.psnr)

    @property
    def mean_ssim(self) -> float | None:
        return None if self.ssim is None else sum(self.ssim) / len(self.ssim)

    def caption(self, index: int) -> str:
        """The figures of one pair, short enough to stand under it."""
        ssim = "" if self.ssim is None else f"   SSIM {self.ssim[index]:.3f}"
        return f"PSNR {_decibels(self.psnr[index])}{ssim}"

    def report(self) -> str:
        """The figures of all pairs as text."""
        lines = [f"{index + 1}: {self.caption(index)}" for index in range(len(self.psnr))]
        if len(lines) > 1:
            ssim = "" if self.ssim is None else f"   SSIM {self.mean_ssim:.3f}"
            lines.append(f"mean: PSNR {_decibels(self.mean_psnr)}{ssim}")
        if self.ssim is None:
            lines.append("SSIM needs kornia, which ComfyUI's requirements name: pip install kornia")
        return "\n".join(lines)


def compare(a: torch.Tensor, b: torch.Tensor) -> Comparison:
    """Two batches of pictures [B, H, W, 3 or 4] in 0…1 → PSNR and SSIM of every pair.

    Alpha is ignored. One picture is compared with all of the other batch. Raises ValueError for
    sizes that differ.
    """
    a, b = _pairs(a, b)
    mse = (a - b).square().mean(dim=(1, 2, 3)).tolist()
    psnr = [math.inf if error == 0 else -10 * math.log10(error) for error in mse]
    try:
        from kornia.metrics import ssim
    except ImportError:
        return Comparison(psnr, None)
    similarity = ssim(a.movedim(-1, 1), b.movedim(-1, 1), window_size=11)
    return Comparison(psnr, similarity.mean(dim=(1, 2, 3)).tolist())


def side_by_side(
    a: torch.Tensor, b: torch.Tensor, label_a: str, label_b: str, captions: list[str]
) -> torch.Tensor:
    """Two batches [B, H, W, 3 or 4] → one labelled picture [1, H', W', 3], a row for every pair.

    Small pictures are enlarged by a whole factor, so that every pixel stays what it was.
    """
    a, b = _pairs(a, b)
    factor = max(1, math.ceil(_MIN_TILE / a.shape[2]))
    height, width = a.shape[1] * factor, a.shape[2] * factor
    size = max(14, width // 18)
    font, line = _font(size), round(size * 1.6)
    row = height + line + _MARGIN
    sheet = Image.new("RGB", (2 * width + 3 * _MARGIN, line + _MARGIN + row * len(a)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate((label_a, label_b)):
        draw.text((_MARGIN + column * (width + _MARGIN), _MARGIN // 2), label, "black", font)
    for index, pair in enumerate(zip(a, b, strict=True)):
        top = line + _MARGIN + index * row
        for column, picture in enumerate(pair):
            tile = to_pil(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (_MARGIN + column * (width + _MARGIN), top))
        draw.text((_MARGIN, top + height + size // 4), captions[index], "black", font)
    return torch.from_numpy(np.array(sheet, dtype=np.float32) / 255)[None]


def to_pil(picture: torch.Tensor) -> Image.Image:
    """picture [H, W, 3] in 0…1 → RGB."""
    values = picture.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(values.numpy(), "RGB")


def _pairs(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    same = a.shape[1:3] == b.shape[1:3]
    if not same or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ValueError(
            "Expected two batches of equally many pictures of one size (or one picture against a "
            f"batch), got {_describe(a)} and {_describe(b)}. Sample both from the same latent."
        )
    count = max(a.shape[0], b.shape[0])
    return tuple(x[..., :3].detach().cpu().float().expand(count, -1, -1, -1) for x in (a, b))


def _describe(x: torch.Tensor) -> str:
    return f"{x.shape[0]} of {x.shape[2]} × {x.shape[1]}"


def _decibels(value: float) -> str:
    return "inf (identical)" if math.isinf(value) else f"{value:.1f} dB"


def _font(size: int) -> ImageFont.FreeTypeFont:
    """A system font with Greek where there is one, else the one that Pillow brings."""
    for name in ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf", "LiberationSans-Regular.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
