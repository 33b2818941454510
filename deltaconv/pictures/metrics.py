"""PSNR and SSIM of pairs of pictures, and the pairs side by side."""

import math
from dataclasses import dataclass

import torch
from einops import reduce

from ..markdown import bullets
from .convert import to_pil, to_tensor
from .sheet import sheet


@dataclass(frozen=True)
class Comparison:
    """PSNR in dB and SSIM of every pair.

    Identical pictures have a PSNR of inf; `ssim` is None without kornia.
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
        """The figures of one pair on one line."""
        ssim = "" if self.ssim is None else f"   SSIM {self.ssim[index]:.3f}"
        return f"PSNR {_decibels(self.psnr[index])}{ssim}"

    def report(self) -> str:
        """The figures of all pairs, a list in Markdown."""
        lines = [f"picture {index + 1}: {self.caption(index)}" for index in range(len(self.psnr))]
        if len(lines) > 1:
            ssim = "" if self.ssim is None else f"   SSIM {self.mean_ssim:.3f}"
            lines.append(f"mean: PSNR {_decibels(self.mean_psnr)}{ssim}")
        if self.ssim is None:
            lines.append("SSIM needs kornia, which ComfyUI's requirements name: pip install kornia")
        return bullets(lines)


def compare(a: torch.Tensor, b: torch.Tensor) -> Comparison:
    """Two batches of pictures [B, H, W, 3 or 4] in 0…1 → PSNR and SSIM of every pair.

    Alpha is ignored. One picture is compared with all of the other batch. Raises ValueError for
    sizes that differ.
    """
    a, b = _pairs(a, b)
    try:
        from kornia.metrics import ssim
    except ImportError:
        return Comparison(psnr(a, b), None)
    similarity = ssim(a.movedim(-1, 1), b.movedim(-1, 1), window_size=11)
    return Comparison(psnr(a, b), similarity.mean(dim=(1, 2, 3)).tolist())


def psnr(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Two batches [B, …] of values in 0…1 → PSNR of every pair in dB, inf where they are equal."""
    errors = reduce((a - b).square(), "b ... -> b", "mean").tolist()
    return [-10 * math.log10(error) if error else math.inf for error in errors]


def side_by_side(
    a: torch.Tensor, b: torch.Tensor, label_a: str, label_b: str, captions: list[str]
) -> torch.Tensor:
    """Two batches [B, H, W, 3 or 4] → one labelled picture [1, H', W', 3], a row for every pair.

    Small pictures are enlarged by a whole factor, so that every pixel stays what it was.
    """
    rows = [tuple(map(to_pil, pair)) for pair in zip(*_pairs(a, b), strict=True)]
    below = [("", caption) for caption in captions]
    return to_tensor(sheet(rows, columns=(label_a, label_b), captions=below))


def _pairs(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both batches in float32 on the CPU, without alpha, equally many; else ValueError."""
    same = a.shape[1:3] == b.shape[1:3]
    if not same or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ValueError(
            "Expected two batches of equally many pictures of one size (or one picture against a "
            f"batch), got {_describe(a)} and {_describe(b)}. Sample both from the same latent."
        )
    count = max(a.shape[0], b.shape[0])
    a, b = (x[..., :3].detach().cpu().float().expand(count, -1, -1, -1) for x in (a, b))
    return a, b


def _describe(x: torch.Tensor) -> str:
    return f"{x.shape[0]} of {x.shape[2]} × {x.shape[1]}"


def _decibels(value: float) -> str:
    return "inf (identical)" if math.isinf(value) else f"{value:.1f} dB"
