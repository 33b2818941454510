"""What determines a MODEL's predictions, as one short name."""

import hashlib
from contextlib import suppress

import torch
from comfy.model_patcher import ModelPatcher

from .patch import detach


def fingerprint(model: ModelPatcher) -> str:
    """Digest of what determines predictions: samples of every tensor, weight patches, sampling
    settings, options of other nodes.

    Weights that a loaded clone has patched count with their unpatched values.
    """
    digest = hashlib.sha256()

    def count_in(name: str, value: object) -> None:
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
            flat = value.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // 256)][:256]
            digest.update(picked.float().cpu().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                count_in(f"{name}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for index, part in enumerate(value):
                count_in(f"{name}.{index}", part)
        elif hasattr(value, "weights"):
            count_in(name, value.weights)
        elif isinstance(value, str | int | float | bool) or value is None:
            digest.update(repr(value).encode())
        elif code := getattr(value, "__code__", None):
            # A function of another node, with its settings in the closure.
            digest.update(f"{value.__module__}.{value.__qualname__}".encode())
            for variable, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
                # ValueError: the cell is still empty.
                with suppress(ValueError):
                    if isinstance(cell.cell_contents, str | int | float | bool):
                        count_in(f"{name}.{variable}", cell.cell_contents)
        else:
            digest.update(type(value).__qualname__.encode())

    for name, tensor in model.model.diffusion_model.state_dict().items():
        key = f"diffusion_model.{name}"
        count_in(key, model.backup[key].weight if key in model.backup else tensor)
    for key in sorted(model.patches):
        count_in(key, model.patches[key])
    bare = detach(model)
    sampling = bare.get_model_object("model_sampling")
    count_in("model_sampling", [kind.__qualname__ for kind in type(sampling).__mro__])
    count_in("model_sampling", dict(sampling.named_buffers()))
    count_in("object_patches", sorted(bare.object_patches))
    count_in("model_options", bare.model_options)
    return digest.hexdigest()[:16]
