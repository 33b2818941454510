"""`python dev.py eval`: the demo teacher, stock or with a ΔConv file, on tensors from a file.

Reads x [B, 3, H, W] (noised pictures), timesteps [B] (0 … 999) and context [B, 12, 64]; writes
eps [B, 3, H, W], the predicted noise, in float32. ComfyUI's own patcher does the rest.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from ..cli.host import entered
from . import DevelopmentError
from .comfyui.tree import chosen_tree

Shape = tuple[int | str, ...]
INPUTS: dict[str, Shape] = {
    "x": ("B", 3, "H", "W"),
    "timesteps": ("B",),
    "context": ("B", 12, 64),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py eval", description=__doc__)
    parser.add_argument(
        "--weights", required=True, help="a ΔConv file, or none for plain attention"
    )
    parser.add_argument("--input", type=Path, required=True, help="safetensors file to read")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    options = parser.parse_args(argv)
    if not options.output.parent.is_dir():
        raise DevelopmentError(
            f"Expected --output in a folder that exists, got {options.output}. Make the folder."
        )
    tensors = read_input(options.input)
    with entered(chosen_tree()):
        eps = predict_noise(tensors, None if options.weights == "none" else options.weights)
    write_output(options.output, {"eps": eps})
    return 0


def read_input(path: Path) -> dict:
    """The tensors of `INPUTS` in float32. Raises DevelopmentError that lists all that is wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DevelopmentError(
            f"Expected a safetensors file with {', '.join(INPUTS)} at {path}, got: {error}."
        ) from error
    if problems := input_problems({name: tensor.shape for name, tensor in found.items()}):
        raise DevelopmentError(f"{path} cannot be evaluated: {'; '.join(problems)}.")
    tensors = {name: found[name].float() for name in INPUTS}
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise DevelopmentError(f"{path} cannot be evaluated: NaN or infinity in {', '.join(bad)}.")
    return tensors


def input_problems(shapes: Mapping[str, Shape]) -> list[str]:
    """Phrases on every tensor that is missing or misshapen; one B holds for all of them."""
    problems, sizes = [], {}
    for name, pattern in INPUTS.items():
        known = f" with B = {sizes['B']}" if sizes else ""
        expected = f"expected {name} [{', '.join(map(str, pattern))}]{known}"
        if name not in shapes:
            problems.append(f"{expected}, got no such tensor")
            continue
        shape = tuple(shapes[name])
        # The first tensor that names B, H or W decides what they are.
        fits = len(shape) == len(pattern) and all(
            size > 0 and size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
            for axis, size in zip(pattern, shape, strict=True)
        )
        if not fits:
            problems.append(f"{expected}, got {list(shape)}")
    return problems


def predict_noise(tensors: Mapping, weights: str | None):
    """eps [B, 3, H, W] in float32 of the packaged teacher, patched by our own Apply if asked.

    ComfyUI must be on the path (`cli.host.enter`). Raises DevelopmentError for weights that do
    not fit.
    """
    import torch

    from ..deltaconv import read_weights
    from ..nodes.apply import DeltaConvApply
    from ..nodes.host.demo_model import load_demo_model

    # Nodes run under inference mode in the server too.
    with torch.inference_mode():
        model = load_demo_model()
        if weights is not None:
            try:
                model = DeltaConvApply.execute(model, read_weights(weights)).result[0]
            except (OSError, ValueError) as error:
                raise DevelopmentError(str(error)) from error
        return call_unet(model, tensors)


def call_unet(model, tensors: Mapping):
    """One call of a MODEL's UNet on `INPUTS` through its patcher → eps [B, 3, H, W] in float32."""
    from comfy.model_management import load_models_gpu

    load_models_gpu([model, *model.get_nested_additional_models()])
    model.pre_run()
    try:
        inputs = {name: tensor.to(model.load_device) for name, tensor in tensors.items()}
        unet = model.model.diffusion_model
        options = model.model_options["transformer_options"].copy()
        x, timesteps, context = (inputs[name] for name in INPUTS)
        return unet(x, timesteps, context=context, transformer_options=options).float().cpu()
    finally:
        model.cleanup()


def write_output(path: Path, tensors: Mapping) -> None:
    """Write a safetensors file in one piece: an older one stays until the new one is whole."""
    from safetensors.torch import save_file

    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(tensors, partial)
        os.replace(partial, path)
    except OSError as error:
        raise DevelopmentError(f"Cannot write {path}: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)
