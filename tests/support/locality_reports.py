"""Locality reports of a few cells, made without a model."""

import torch
from comfyui_deltaconv.deltaconv.locality.attention import measure_attention
from comfyui_deltaconv.deltaconv.locality.report import (
    LocalityReport,
    SiteLocality,
    measure_site,
)


def small_report(path: str = "blocks.0.attn", family: str = "", size: int = 8) -> LocalityReport:
    """One site of that path, its attention falling off with distance, with a map of one point."""
    index = torch.arange(size * size)
    cells = torch.stack([index // size, index % size], dim=-1).double()
    q = (-(torch.cdist(cells, cells) ** 2) / 4).float()[None, None]
    k = torch.eye(size * size)[None, None]
    measurement = measure_site([measure_attention(q, k, size, size, scale=1.0)], 1.0)
    site = SiteLocality(path, 0, 32, size, size, [measurement])
    maps = {path: q[0, 0, 0].softmax(-1).view(1, 1, 1, size, size).half()}
    return LocalityReport(
        family,
        (size, size),
        [1.0],
        [0.5],
        {path: site},
        points=[(0.5, 0.5)],
        maps=maps,
        pictures=[torch.zeros(size, size, 3)],
    )
