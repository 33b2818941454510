"""Pictures between torch and Pillow."""

import numpy as np
import torch
from PIL import Image


def to_pil(picture: torch.Tensor) -> Image.Image:
    """picture [H, W, 3] in 0…1 → RGB."""
    values = picture.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(values.numpy())


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB → [1, H, W, 3] in 0…1."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None]
