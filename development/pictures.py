"""`python dev.py pictures [NODE ...]`: the pictures of the help pages, from the real page.

Each is a node of the pack beside what it gave, in a graph of a few nodes on the packaged demo; the
rest of the graph stands out of view. About 320 pixels wide, as the page's info panel shows them.
"""

import argparse
import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

from selenium.webdriver.support.ui import WebDriverWait

from . import ROOT
from .comfyui.browser import chromium, in_page, open_page
from .comfyui.server import running
from .comfyui.tree import chosen_tree

FOLDER = ROOT / "web" / "docs" / "images"
WIDTH, MARGIN = 320, 8
SECONDS = 600
# Few, so that a picture takes some kilobytes: the page draws in few, and small pictures bear it.
COLORS = 48


@dataclass(frozen=True)
class Example:
    """Nodes by a name of one letter or so: (class, widgets, {input: "name.output"}).

    `shown` are those in the picture, from the top; `height` gives some of them room.
    """

    nodes: dict[str, tuple[str, dict, dict[str, str]]]
    shown: tuple[str, ...]
    run: bool = True
    height: dict[str, int] = field(default_factory=dict)


_MODEL = {"m": ("DeltaConvDemoModel", {}, {})}
_PROMPT = {"p": ("DeltaConvDemoPrompt", {"text": "red apple"}, {})}
_EMPTY = {"n": ("DeltaConvDemoPrompt", {"text": ""}, {})}
_VAE = {"v": ("VAELoader", {"vae_name": "pixel_space"}, {})}


def _latent(side: int) -> dict:
    return {"l": ("EmptyChromaRadianceLatentImage", {"width": side, "height": side}, {})}


def _drawing(name: str, model: str, steps: int = 12) -> dict:
    """A sampler `name`, its decoder and its preview (`name` with d and i)."""
    sampler = {"seed": 1, "steps": steps, "cfg": 4.0}
    sampler |= {"sampler_name": "dpmpp_2m", "scheduler": "karras"}
    sampler |= {"control_after_generate": "fixed"}
    inputs = {"model": model, "positive": "p.0", "negative": "n.0", "latent_image": "l.0"}
    return {
        name: ("KSampler", sampler, inputs),
        f"{name}d": ("VAEDecode", {}, {"samples": f"{name}.0", "vae": "v.0"}),
        f"{name}i": ("PreviewImage", {}, {"images": f"{name}d.0"}),
    }


def _text(source: str, markdown: bool = False) -> tuple:
    return ("PreviewAny", {"preview_mode": True} if markdown else {}, {"source": source})


def _image(source: str) -> tuple:
    return ("PreviewImage", {}, {"images": source})


_BASE = _MODEL | _PROMPT | _EMPTY | _latent(64) | _VAE
_SMALL = _BASE | _latent(32)
_BOTH = {"model": "m.0", "deltaconv": "m.1"}
_APPLY = {"a": ("DeltaConvApply", {}, _BOTH | {"latent": "l.0"})}
_LOCALITY = {
    "y": (
        "DeltaConvLocality",
        {"percents": "0.5"},
        {"model": "m.0", "positive": "p.0", "latent": "l.0", "deltaconv": "m.1"},
    )
}
_DISTILL = {
    "s": (
        "DeltaConvDistillSettings",
        {"layer_steps": 40, "joint_steps": 0, "batch_size": 1, "samples": 2, "preview_every": 0}
        | {"sample_size": 16, "initialization": "random"},
        {},
    ),
    "d": (
        "DeltaConvDistill",
        {"prompts": "red apple\noctopus", "choice": "fastest", "minutes": 0.0},
        {"model": "m.0", "settings": "s.0"},
    ),
}
EXAMPLES = {
    "DeltaConvApply": Example(
        _BASE | _APPLY | {"t": _text("a.1", True)}, ("a", "t"), height={"t": 230}
    ),
    "DeltaConvBenchmark": Example(
        _MODEL
        | {"b": ("DeltaConvBenchmark", {"sizes": "32, 64", "repeats": 3}, _BOTH)}
        | {"i": _image("b.1")},
        ("b", "i"),
    ),
    "DeltaConvChoose": Example(
        _SMALL
        | {
            "c": (
                "DeltaConvChoose",
                {"steps": 6},
                _BOTH | {"positive": "p.0", "negative": "n.0", "vae": "v.0", "latent": "l.0"},
            )
        }
        | {"i": _image("c.2")},
        ("c", "i"),
    ),
    "DeltaConvCompare": Example(
        _BASE
        | _APPLY
        | _drawing("k", "m.0")
        | _drawing("j", "a.0")
        | {"c": ("DeltaConvCompare", {}, {"images_a": "kd.0", "images_b": "jd.0"})}
        | {"i": _image("c.0")},
        ("c", "i"),
    ),
    "DeltaConvCudaGraph": Example(
        _MODEL | {"g": ("DeltaConvCudaGraph", {}, {"model": "m.0"})}, ("m", "g"), run=False
    ),
    "DeltaConvDemoModel": Example(_BASE | _drawing("k", "m.0"), ("m", "k", "ki")),
    "DeltaConvDemoPrompt": Example(
        _PROMPT | {"t": _text("p.1")} | {"p": ("DeltaConvDemoPrompt", {"text": "red wombat"}, {})},
        ("p", "t"),
        height={"t": 140},
    ),
    "DeltaConvDistill": Example(
        _MODEL | _DISTILL | {"o": ("LossGraphNode", {}, {"loss": "d.1"})}, ("d", "o")
    ),
    "DeltaConvDistillSettings": Example(_MODEL | _DISTILL, ("s", "d"), run=False),
    "DeltaConvDownload": Example(
        _MODEL
        | {"w": ("DeltaConvDownload", {}, {})}
        | {"a": ("DeltaConvApply", {}, {"model": "m.0", "deltaconv": "w.0"})},
        ("w", "a"),
        run=False,
    ),
    "DeltaConvEvaluate": Example(
        _SMALL
        | {
            "e": (
                "DeltaConvEvaluate",
                {"steps": 6, "levels": 4},
                _BOTH | {"positive": "p.0", "negative": "n.0", "vae": "v.0", "latent": "l.0"},
            )
        }
        | {"i": _image("e.2")},
        ("e", "i"),
    ),
    "DeltaConvLoad": Example(
        _MODEL
        | _latent(64)
        | {"w": ("DeltaConvLoad", {}, {})}
        | {"a": ("DeltaConvApply", {}, {"model": "m.0", "deltaconv": "w.0", "latent": "l.0"})}
        | {"t": _text("a.1")},
        ("w", "a"),
    ),
    "DeltaConvLocality": Example(
        _SMALL | _LOCALITY | {"i": _image("y.2")}, ("y",), height={"y": 780}
    ),
    "DeltaConvRecipe": Example(
        _SMALL
        | _LOCALITY
        | {"r": ("DeltaConvRecipe", {}, {"report": "y.0"})}
        | {"t": _text("r.1")},
        ("r", "t"),
        height={"t": 230},
    ),
    "DeltaConvSave": Example(
        _MODEL | {"w": ("DeltaConvSave", {}, {"deltaconv": "m.1"})}, ("m", "w")
    ),
    "DeltaConvSaveLocality": Example(
        _SMALL
        | _LOCALITY
        | {"w": ("DeltaConvSaveLocality", {}, {"report": "y.0"})}
        | {"t": _text("w.1")},
        ("w", "t"),
        height={"t": 120},
    ),
    "DeltaConvSelfTest": Example(
        {"f": ("DeltaConvSelfTest", {"seconds": 20.0}, {}), "t": _text("f.0", True)},
        ("f", "t"),
        height={"t": 300},
    ),
}

_BUILD = """
const [nodes, shown, heights, width] = arguments, made = {};
// Another graph: the page keeps values of widgets by graph, node and name.
await app.loadGraphData({id: crypto.randomUUID(), nodes: [], links: [], version: 0.4,
    last_node_id: 0, last_link_id: 0});
for (const [name, [kind, widgets]] of Object.entries(nodes)) {
    const node = made[name] = LiteGraph.createNode(kind);
    app.graph.add(node);
    for (const [widget, value] of Object.entries(widgets))
        node.widgets.find(each => each.name === widget).value = value;
    node.setSize([width, heights[name] ?? node.computeSize()[1]]);
    const place = shown.indexOf(name);
    node.pos = place < 0 ? [-4000, 0] : [40, 40];
}
for (const [name, [, , inputs]] of Object.entries(nodes))
    for (const [input, source] of Object.entries(inputs)) {
        const [from, slot] = source.split('.');
        const place = made[name].inputs.findIndex(each => each.name === input);
        if (place < 0) throw new Error(`${nodes[name][0]} has no input ${input}`);
        made[from].connect(Number(slot), made[name], place);
    }
app.canvas.ds.scale = 1;
app.canvas.ds.offset = [200, 120];
window.shownIds = shown.map(name => made[name].id);
app.canvas.setDirty(true, true);
"""
_RUN = """
window.ended = null;
app.api.addEventListener('execution_success', () => { window.ended = 'success'; });
app.api.addEventListener('execution_error', event => {
    window.ended = event.detail.exception_message;
});
if (!await app.queuePrompt(0)) window.ended = JSON.stringify(app.lastNodeErrors);
"""
# One under the other, as high as they have become.
_STACK = """
let y = 40;
for (const id of window.shownIds) {
    const node = app.graph.getNodeById(id);
    const box = document.querySelector(`[data-node-id="${id}"]`).getBoundingClientRect();
    node.pos = [40, y];
    y += box.height + 16;
}
app.canvas.deselectAll();
app.canvas.setDirty(true, true);
"""
_BOXES = """
return window.shownIds.map(id => {
    const box = document.querySelector(`[data-node-id="${id}"]`).getBoundingClientRect();
    return [box.x, box.y, box.right, box.bottom];
});
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py pictures", description=__doc__)
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="these alone")
    chosen = parser.parse_args(argv).nodes or list(EXAMPLES)
    if unknown := set(chosen) - EXAMPLES.keys():
        parser.error(f"no example for {', '.join(sorted(unknown))}")
    # High, so that no picture is cut.
    with running(chosen_tree()) as server, chromium(1600, 1900) as browser:
        _weights(server)
        open_page(browser, server, Comfy_VueNodes_Enabled=True, Comfy_Minimap_Visible=False)
        for name in chosen:
            path = FOLDER / f"{name}.png"
            _shrink(_draw(browser, EXAMPLES[name]), path)
            print(f"{path}  {path.stat().st_size / 1e3:.1f} kB", flush=True)
    return 0


def _weights(server) -> None:
    """A file for the loader to offer."""
    from ..deltaconv import demo

    file = server.base / "models" / "deltaconv" / "emoji_demo.safetensors"
    file.write_bytes(demo.DELTACONV_PATH.read_bytes())


def _draw(browser, example: Example) -> bytes:
    """The example's shown nodes, as the page draws them, after its run."""
    in_page(browser, _BUILD, example.nodes, example.shown, example.height, WIDTH)
    if example.run:
        in_page(browser, _RUN)
        ended = WebDriverWait(browser, SECONDS).until(lambda page: in_page(page, "return ended"))
        if ended != "success":
            raise RuntimeError(f"Expected the example to run, got {ended}")
    loaded = "return [...document.images].every(image => image.complete)"
    WebDriverWait(browser, 60).until(lambda page: page.execute_script(loaded))
    _settled(browser)
    in_page(browser, _STACK)
    _settled(browser)
    boxes = in_page(browser, _BOXES)
    left, top = (min(box[axis] for box in boxes) - MARGIN for axis in (0, 1))
    right, bottom = (max(box[axis] for box in boxes) + MARGIN for axis in (2, 3))
    clip = {"x": left, "y": top, "width": right - left, "height": bottom - top, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
    return base64.b64decode(shot["data"])


def _settled(browser) -> None:
    """Wait until the nodes have stopped growing and moving."""
    seen = []

    def same(_) -> bool:
        seen.append(in_page(browser, _BOXES))
        return len(seen) > 3 and seen[-1] == seen[-2] == seen[-3]

    WebDriverWait(browser, 60).until(same)


def _shrink(picture: bytes, path: Path) -> None:
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
