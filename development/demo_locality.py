"""`python dev.py demo --locality`: the locality workflow in a real ComfyUI server.

One prompt through `workflows/5_attention_locality.json`; writes its pictures, table, recipe, JSON
and HTML page to a folder.
"""

import json
import sys
import time
from pathlib import Path

from . import ROOT
from .comfyui.client import Json
from .comfyui.server import FASTEST_ATTENTION, Server, has_accelerator, running
from .comfyui.tree import chosen_tree, version_of
from .comfyui.workflow import links, to_prompt

WORKFLOW = ROOT / "workflows" / "5_attention_locality.json"
# Output of the measuring or the recipe node → file it is kept as.
PICTURES = {"model_page": "model", "profiles": "profiles", "points": "points", "curve": "curve"}
TEXTS = {"table": "table.txt", "text": "recipe.txt"}


def draw_locality(prompt: str, folder: Path) -> None:
    """Start a server, run the workflow for `prompt`, write what it made to `folder`, say where."""
    tree, cpu = chosen_tree(), not has_accelerator()
    print(f"Starting ComfyUI {version_of(tree)} on {'the CPU' if cpu else 'the GPU'} …", flush=True)
    # What is measured does not depend on how attention is computed.
    with running(tree, cpu=cpu, arguments=[FASTEST_ATTENTION]) as server:
        since = time.perf_counter()
        graph = prompt_for(server, prompt)
        history = server.queue(graph, on_event=_bar())
        seconds = time.perf_counter() - since
        paths = keep(server, graph, history, folder)
        for file in (server.base / "output" / "deltaconv").glob("locality_*"):
            kept = folder / f"report{file.suffix}"
            kept.write_bytes(file.read_bytes())
            paths.append(kept)
    print((folder / TEXTS["table"]).read_text(encoding="utf-8"))
    print(f"\nMeasured and drawn in {seconds:.1f} s:")
    for path in paths:
        print(f"  {path.resolve()}")


def prompt_for(server: Server, text: str) -> Json:
    """The workflow as a prompt that draws and measures `text`."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    graph = to_prompt(workflow, server.object_info())
    for node in graph.values():
        if node["class_type"] == "DeltaConvDemoPrompt":
            node["inputs"]["text"] = text
    return graph


def keep(server: Server, graph: Json, history: Json, folder: Path) -> list[Path]:
    """Write pictures and texts of the run to `folder` → their paths."""
    names = {
        kind: server.object_info()[kind]["output_name"]
        for kind in {node["class_type"] for node in graph.values()}
    }
    paths = []
    for node, made in history["outputs"].items():
        for source, slot in links(graph[node]).values():
            name = names[graph[source]["class_type"]][slot]
            for index, image in enumerate(made.get("images", []) if name in PICTURES else []):
                number = f"_{index + 1}" if len(made["images"]) > 1 else ""
                paths.append(folder / f"{PICTURES[name]}{number}.png")
                paths[-1].write_bytes(server.view(image))
            if name in TEXTS and made.get("text"):
                paths.append(folder / TEXTS[name])
                paths[-1].write_text("".join(made["text"]), encoding="utf-8")
    return paths


def _bar():
    """A progress bar that follows the server's own messages."""
    from tqdm import tqdm

    bar = tqdm(unit="call", mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True)

    def follow(event: str, detail: Json) -> None:
        if event == "progress":
            bar.total = detail["max"]
            bar.update(detail["value"] - bar.n)

    return follow
