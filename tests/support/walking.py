"""What a person does in the page: press, type, drop files, run; and pictures of what is seen."""

import base64
import html
import json
import os
from pathlib import Path

from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

DEMO = ROOT / "workflows" / "1_demo.json"
SECONDS = 60

_FIND = "const find = name => app.graph.nodes.find(node => [node.title, node.type].includes(name));"
_DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), each => each.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], arguments[1], {type: arguments[2]}));
for (const kind of ['dragenter', 'dragover', 'drop'])
    app.canvas.canvas.dispatchEvent(new DragEvent(kind,
        {dataTransfer, bubbles: true, cancelable: true, clientX: 700, clientY: 880}));
"""
LISTEN = """
window.progress = []; window.ended = null; window.said = null;
if (window.listening) return;
window.listening = true;
app.api.addEventListener('progress', ({detail}) => window.progress.push(
    [detail.value, detail.max, document.title]));
for (const kind of ['success', 'error', 'interrupted'])
    app.api.addEventListener(`execution_${kind}`, ({detail}) => {
        window.ended = kind; window.said = detail.exception_message ?? null;
    });
"""
_PRESS = """
const having = each => each.innerText?.trim() === arguments[0];
const found = [...document.querySelectorAll(arguments[1] + ' *')].filter(
    each => having(each) && each.offsetParent && ![...each.children].some(having));
found[0]?.click();
return found.length;
"""
# Boxes on the canvas in its own units, as drawn: the page makes a node larger than its size says.
_BOXES = """
const {scale, offset} = app.canvas.ds;
const place = app.canvas.canvas.getBoundingClientRect();
return app.graph.nodes.map(node => {
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
    if (drawn?.width) return [node.title, drawn.x / scale, drawn.y / scale,
        drawn.right / scale, drawn.bottom / scale];
    const [x, y, width, height] = node.boundingRect;
    return [node.title, x, y, x + width, y + height];
});
"""
_PIXELS = """
const found = [];
for (const name of arguments[0]) {
    const [output] = app.nodeOutputs[find(name).id].images;
    const image = new Image();
    image.src = app.api.apiURL('/view?' + new URLSearchParams(output));
    await image.decode();
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    found.push(Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data));
}
return found;
"""


class Walk:
    """One renderer's page, and a folder for the pictures of it."""

    def __init__(self, browser, server, vue: bool, folder: Path):
        self.browser, self.server, self.vue, self.folder = browser, server, vue, folder
        self.taken = 0

    def page(self, script: str, *arguments):
        """Run it in the page, where `find(title or type)` gives a node."""
        return in_page(self.browser, _FIND + script, *arguments)

    def wait(self, until, seconds: float = SECONDS):
        return WebDriverWait(self.browser, seconds).until(lambda _: until())

    def shot(self, name: str) -> None:
        self.taken += 1
        renderer = "nodes" if self.vue else "canvas"
        self.browser.save_screenshot(str(self.folder / f"{renderer}-{self.taken:02}-{name}.png"))

    def begin(self, workflow: dict | None = None) -> None:
        """The page with this workflow open, and nothing over it."""
        open_page(self.browser, self.server, Comfy_VueNodes_Enabled=self.vue)
        self.page("document.querySelector('[data-testid=error-overlay-dismiss]')?.click()")
        if workflow:
            load_workflow(self.browser, workflow)

    def command(self, name: str) -> None:
        self.page("await app.extensionManager.command.execute(arguments[0])", name)

    def press(self, selector: str) -> None:
        """A real click on what is there, or comes."""

        def there():
            return [
                e for e in self.browser.find_elements("css selector", selector) if e.rect["width"]
            ]

        self.wait(there)[0].click()

    def press_words(self, words: str, inside: str = "body") -> None:
        self.wait(lambda: self.page(_PRESS, words, inside))

    def drop(self, data: bytes, name: str, kind: str) -> None:
        """Let a file fall onto an empty part of the canvas."""
        self.page(_DROP, base64.b64encode(data).decode(), name, kind)

    def keys(self, *keys: str) -> None:
        """Press them together."""
        actions = ActionChains(self.browser)
        for key in keys[:-1]:
            actions.key_down(key)
        actions.send_keys(keys[-1])
        for key in keys[:-1]:
            actions.key_up(key)
        actions.perform()

    def write(self, old: str, new: str) -> None:
        """Type over the text of a field that shows `old`."""

        def field():
            fields = self.browser.find_elements("css selector", "textarea")
            return [e for e in fields if e.rect["width"] and e.get_property("value") == old]

        (box, *_) = self.wait(field)
        box.click()
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(new)

    def select(self, name: str) -> None:
        self.page(
            "app.canvas.deselectAll(); app.canvas.selectItems([find(arguments[0])]);"
            "app.canvas.canvas.focus(); app.canvas.setDirty(true, true);",
            name,
        )

    def widget(self, node: str, name: str):
        return self.page(
            "return find(arguments[0]).widgets.find(each => each.name === arguments[1])?.value"
            " ?? ''",
            node,
            name,
        )

    def line(self, node: str) -> str:
        """The text below a node's widgets."""
        return html.unescape(self.widget(node, "$$node-text-preview"))

    def text(self) -> str:
        """All that can be read in the page but the log."""
        return self.browser.execute_script("return document.body.innerText")

    def start(self, button: str = "[data-testid=queue-button]") -> None:
        self.page(LISTEN)
        self.press(button)

    def ended(self) -> str:
        """success, error or interrupted."""
        return self.wait(lambda: self.page("return window.ended"))

    def run(self) -> str:
        self.start()
        return self.ended()

    def pixels(self, *names: str) -> list[list[int]]:
        return self.page(_PIXELS, names)

    def overlaps(self) -> list[tuple[str, str]]:
        """Titles of nodes that are drawn over each other."""
        boxes = self.page(_BOXES)
        return [
            (a[0], b[0])
            for i, a in enumerate(boxes)
            for b in boxes[i + 1 :]
            if a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
        ]


def small_demo() -> dict:
    """The demo's workflow, drawn in three steps on a quarter of its pixels."""
    workflow = json.loads(DEMO.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 3
        if node["type"] == "EmptyChromaRadianceLatentImage":
            node["widgets_values"][:2] = [32, 32]
    return workflow


def pictures_folder(tmp_path_factory) -> Path:
    """Where DELTACONV_SHOTS says, else a folder that pytest keeps for a while."""
    if chosen := os.environ.get("DELTACONV_SHOTS"):
        Path(chosen).mkdir(parents=True, exist_ok=True)
        return Path(chosen)
    return tmp_path_factory.mktemp("walk")
