"""`python dev.py demo`: the demo workflow in a real ComfyUI server, with and without ΔConv.

Draws each prompt with the teacher, with the student, and with blocks where they pay most, from the
same noise, one picture at a time, times the samplers, and writes a labelled sheet of the pictures.
"""

import argparse
import copy
import io
import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from ..cli.host import entered
from . import ROOT, DevelopmentError
from .comfyui.client import Client, Json
from .comfyui.server import FASTEST_ATTENTION, Server, has_accelerator, running
from .comfyui.tree import chosen_tree, version_of
from .comfyui.workflow import links, to_prompt, without_others
from .demo_locality import draw_locality

WORKFLOW = ROOT / "workflows" / "1_demo.json"
PROMPTS = ("red apple", "sun with face", "cat face", "octopus")
WARM_UP_STEPS = 1
# Inputs of Apply ΔConv: the layers of the largest map, which are nearly all of attention's time,
# and not the first steps, which decide what the picture shows.
BALANCED = {"sites": "level 0", "start_percent": 0.25}
# Role → its name on paper.
ROLES = {"teacher": "self-attention", "student": "ΔConv", "balanced": "ΔConv, balanced"}


@dataclass(frozen=True)
class Graph:
    """The demo workflow as a prompt, and the ids in it that this script works with."""

    prompt: Json
    text: str
    samplers: dict[str, str]
    previews: dict[str, str]
    apply: str

    @classmethod
    def read(cls, object_info: Json) -> "Graph":
        workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
        prompt = to_prompt(workflow, object_info)
        samplers, previews, text, apply = {}, {}, "", ""
        for node in prompt:
            if prompt[node]["class_type"] == "KSampler":
                sources = links(prompt[node])
                model = sources["model"][0]
                patched = prompt[model]["class_type"] == "DeltaConvApply"
                samplers["student" if patched else "teacher"] = node
                apply = model if patched else apply
                text = sources["positive"][0]
        for node in prompt:
            if prompt[node]["class_type"] == "PreviewImage":
                (role,) = (r for r in samplers if samplers[r] in without_others(prompt, node))
                previews[role] = node
        return cls(prompt, text, samplers, previews, apply)

    def with_inputs(self, text: str, apply: Json | None = None, **sampler_inputs: object) -> Json:
        """A copy of the prompt that draws `text`, with these inputs of Apply ΔConv."""
        prompt = copy.deepcopy(self.prompt)
        prompt[self.text]["inputs"]["text"] = text
        prompt[self.apply]["inputs"] |= apply or {}
        for node in self.samplers.values():
            prompt[node]["inputs"] |= sampler_inputs
        return prompt


@dataclass
class Watch:
    """Seconds that each node took, from the server's own messages; moves a progress bar."""

    bar: object = None
    seconds: dict[str, float] = field(default_factory=dict)
    _node: str | None = None
    _since: float = 0.0
    _steps: int = 0

    def __call__(self, event: str, detail: Json) -> None:
        now = time.perf_counter()
        if event == "executing":
            if self._node:
                self.seconds[self._node] = now - self._since
            self._node, self._since, self._steps = detail["node"], now, 0
        elif event == "progress" and self.bar is not None:
            self.bar.update(detail["value"] - self._steps)
            self._steps = detail["value"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="words of emoji names")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output" / "demo", help="folder for the pictures"
    )
    parser.add_argument(
        "--locality", action="store_true", help="show where the first prompt's attention looks"
    )
    parser.add_argument(
        "--distill",
        "--distil",
        action="store_true",
        help="distill the demo's blocks anew, in a few minutes",
    )
    options = parser.parse_args(argv)
    if options.steps < 1:
        raise DevelopmentError(f"Expected --steps of 1 or more, got {options.steps}.")
    _make_folder(options.output)
    _name_unknown_words(options.prompts)
    if options.locality:
        draw_locality(options.prompts[0], options.output)
        return 0
    if options.distill:
        from .distill_demo import distill_demo

        with entered(chosen_tree()):
            distill_demo(options.output)
        return 0
    tree, cpu = chosen_tree(), not has_accelerator()

    print(f"Starting ComfyUI {version_of(tree)} on {'the CPU' if cpu else 'the GPU'} …", flush=True)
    with running(tree, cpu=cpu) as server:
        _, chosen = _draw(server, options.prompts[:1], options.steps)
        attention = attention_of(server)
    # All pictures are drawn with the fastest attention: as ComfyUI chose it, the first prompt alone
    # is timed, for on a CPU that takes several times as long.
    print(f"Starting it again with {FASTEST_ATTENTION} …", flush=True)
    with running(tree, cpu=cpu, arguments=[FASTEST_ATTENTION]) as server:
        pictures, fairer = _draw(server, options.prompts, options.steps)

    path = options.output / "teacher_and_student.png"
    psnr = _save_grid(path, options.prompts, pictures, fairer, options.steps)
    by_prompt = {role: dict(zip(options.prompts, psnr[role], strict=True)) for role in psnr}
    ways = {
        f"as ComfyUI chose its attention ({attention})": chosen,
        f"with {FASTEST_ATTENTION}": fairer,
    }
    for line in report(ways, by_prompt):
        print(line)
    print(f"\nPicture: {path.resolve()}")
    return 0


def attention_of(server: Server) -> str:
    """How ComfyUI names the attention it chose, from its log."""
    found = re.search(r"Using (\S.*?)(?: optimization for)? attention", server.said())
    return found[1] if found else "unknown"


def report(ways: dict[str, dict[str, list[float]]], psnr: dict[str, dict[str, float]]) -> list[str]:
    """The figures as lines of text; per way of attention the seconds of each picture, by role.

    `psnr` maps role to prompt to dB against the teacher's picture.
    """
    prompts = next(iter(psnr.values()))
    width = 2 + max(map(len, (*prompts, *ROLES.values())))
    lines = ["", "Seconds per picture: the sampler node, mean after a warm-up (range, pictures)"]
    for way, seconds in ways.items():
        faster = {role: mean(seconds["teacher"]) / mean(seconds[role]) for role in psnr}
        said = ", ".join(f"{ROLES[role]} is {times:.1f}× faster" for role, times in faster.items())
        lines.append(f"  {way}: {said}")
        for role, name in ROLES.items():
            values = seconds[role]
            spread = f"({min(values):.1f}–{max(values):.1f}, {len(values)})"
            lines.append(f"    {name:<{width}}{mean(values):6.2f}  {spread}")
    for role, values in psnr.items():
        lines += ["", f"PSNR of the picture by {ROLES[role]} against the teacher's, in dB"]
        lines += [f"    {prompt:<{width}}{value:6.1f}" for prompt, value in values.items()]
        lines.append(f"    {'mean':<{width}}{mean(values.values()):6.1f}")
    return lines


def _draw(server: Server, prompts: Sequence[str], steps: int):
    """Per role the pictures and the seconds of each, one picture at a time."""
    from tqdm import tqdm

    graph = Graph.read(server.object_info())

    def prompt_for(text: str, steps: int, roles: Sequence[str], **inputs: object) -> Json:
        previews = [graph.previews[role] for role in roles]
        return without_others(graph.with_inputs(text, steps=steps, **inputs), *previews)

    # What one prompt draws in turn: roles, each with the graph's role that draws it.
    turns = (
        ({"teacher": "teacher", "student": "student"}, None),
        ({"balanced": "student"}, BALANCED),
    )
    # Loads the model and lets torch choose its algorithms; another seed, so nothing is reused.
    server.queue(prompt_for("rocket", WARM_UP_STEPS, ["teacher", "student"], seed=0))
    pictures, seconds = {role: [] for role in ROLES}, {role: [] for role in ROLES}
    total = len(prompts) * len(ROLES) * steps
    # In a file or a build log, a line now and then is enough.
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=total, unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        for text in prompts:
            bar.set_description(text)
            for roles, apply in turns:
                watch = Watch(bar)
                prompt = prompt_for(text, steps, list(roles.values()), apply=apply)
                history = server.queue(prompt, on_event=watch)
                for role, drawn_by in roles.items():
                    seconds[role].append(watch.seconds[graph.samplers[drawn_by]])
                    pictures[role].append(_picture(server, history, graph.previews[drawn_by]))
    return pictures, seconds


def _picture(client: Client, history: Json, node: str):
    from PIL import Image

    (image,) = history["outputs"][node]["images"]
    return Image.open(io.BytesIO(client.view(image))).convert("RGB")


def _save_grid(path: Path, prompts, pictures, seconds, steps: int) -> dict[str, list[float]]:
    """Write the labelled sheet → role → PSNR of every picture against the teacher's, in dB."""
    import numpy as np
    import torch

    from ..deltaconv.pictures.metrics import compare
    from .grid import Column, draw_grid

    def batch(role: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.asarray(image) for image in pictures[role]])) / 255

    others = [role for role in ROLES if role != "teacher"]
    psnr = {role: compare(batch("teacher"), batch(role)).psnr for role in others}
    columns = [
        Column(
            prompt,
            [pictures[role][index] for role in ROLES],
            ["", *(f"PSNR {psnr[role][index]:.1f} dB" for role in others)],
        )
        for index, prompt in enumerate(prompts)
    ]
    rows = [(name, f"{mean(seconds[role]):.1f} s per picture") for role, name in ROLES.items()]
    title = "One model, the same noise: ΔConvBlocks in place of all self-attention, and balanced"
    means = ", ".join(f"{ROLES[role]} {mean(psnr[role]):.1f} dB" for role in others)
    footer = (
        f"mean PSNR: {means} · {steps} steps · {platform.machine()}, "
        f"torch {torch.__version__.partition('+')[0]} · emoji after Noto Color Emoji (SIL OFL 1.1)"
    )
    draw_grid(columns, rows, title, footer).save(path)
    return psnr


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DevelopmentError(f"Cannot make the folder {folder}: {error}.") from error


def _name_unknown_words(prompts: Sequence[str]) -> None:
    from ..deltaconv import demo

    encoder = demo.text_encoder()
    for prompt in prompts:
        if encoder.unknown(prompt):
            print(f"{prompt!r}: {encoder.report(prompt)}")
