"""Run as a script: the nodes that draw or measure, where some modules are not installed.

Arguments: a ComfyUI tree, a folder to write in, a comma-separated list of top-level modules.
Prints, as JSON, what each node gave.
"""

import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path

TREE, BASE, ABSENT = Path(sys.argv[1]), Path(sys.argv[2]), set(sys.argv[3].split(","))
DISTILL = {
    "kernels": "by size",
    "unconditional": None,
    "prompts": "octopus",
    "layer_steps": 2,
    "joint_steps": 0,
    "batch_size": 2,
    "layer_rate": 1e-3,
    "joint_rate": 1e-3,
    "seed": 0,
    "folder": "bare",
    "save_every": 1,
    "preview_every": 1,
    "losses": "ours",
    "initialization": "random",
    "precision": "float32",
    "gradient_checkpointing": True,
    "accumulate": 1,
    "samples": 2,
    "sample_size": 16,
}


class Without(PathFinder):
    """The usual finder, which does not find what is absent."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ABSENT:
            return None
        return super().find_spec(fullname, path, target)


def main() -> None:
    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
    from comfyui_deltaconv.cli import host

    host.enter(TREE, BASE)
    import torch

    torch.set_num_threads(1)
    with torch.inference_mode():
        print(json.dumps({"given": given(torch), "loaded": sorted(ABSENT & sys.modules.keys())}))


def given(torch) -> dict:
    import comfy.utils
    from comfyui_deltaconv.nodes.benchmark import DeltaConvBenchmark
    from comfyui_deltaconv.nodes.choose import DeltaConvChoose
    from comfyui_deltaconv.nodes.compare import DeltaConvCompare
    from comfyui_deltaconv.nodes.demo import DeltaConvDemoModel, DeltaConvDemoPrompt
    from comfyui_deltaconv.nodes.evaluate import DeltaConvEvaluate
    from comfyui_deltaconv.nodes.locality import DeltaConvLocality, DeltaConvSaveLocality
    from comfyui_deltaconv.nodes.recipe import DeltaConvRecipe

    # A script that is run apart from its folder finds none of its neighbors.
    sys.path.append(str(Path(__file__).parent))
    from distill_nodes import distill

    model, weights = DeltaConvDemoModel.execute().args
    positive = DeltaConvDemoPrompt.execute("red apple").args[0]
    latent = {"samples": torch.zeros(1, 3, 24, 16)}
    measured = DeltaConvLocality.execute(
        model, positive, latent, "0.5", "0.5, 0.5", "window and block", weights
    ).args
    pictures = latent["samples"].new_zeros(1, 64, 64, 3)
    previews = []
    comfy.utils.set_progress_bar_global_hook(lambda *told, **_: previews.append(told[2]))
    distilled = distill(model, **DISTILL)
    nodes = {
        "locality": measured[1:],
        "recipe": DeltaConvRecipe.execute(measured[0], "budget", 0.4).args,
        "save": DeltaConvSaveLocality.execute(measured[0], "bare").args,
        "evaluate": DeltaConvEvaluate.execute(
            model, weights, positive, latent=latent, seeds="1", steps=1, levels=1
        ).args,
        "choose": DeltaConvChoose.execute(
            model, weights, positive, latent={"samples": torch.zeros(1, 3, 32, 32)}, steps=1
        ).args[2:],
        "benchmark": DeltaConvBenchmark.execute(
            model, weights, "16", batch=1, repeats=1, seconds=0.1
        ).args,
        "compare": DeltaConvCompare.execute(pictures, pictures, "a", "b").args,
        "distill": distilled[1:],
        "previews": [preview[1] for preview in previews if preview],
    }
    return {name: [plain(value) for value in values] for name, values in nodes.items()}


def plain(value):
    return value if isinstance(value, str | float | dict) else f"{type(value).__name__}"


if __name__ == "__main__":
    main()
