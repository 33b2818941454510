"""The locality workflow and its interactive view in the real page, clicked in both renderers."""

import json

import pytest
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page
from comfyui_deltaconv.development.comfyui.workflow import to_prompt
from comfyui_deltaconv.development.demo_locality import WORKFLOW
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

NODES, CANVAS = "Vue nodes", "canvas"
MEASURED = "DeltaConvLocality"


@pytest.fixture(scope="module")
def workflow():
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def short(workflow):
    """The measuring node alone, on a small picture, and without sensitivity."""
    short = json.loads(json.dumps(workflow))
    kept = {"DeltaConvDemoModel", "DeltaConvDemoPrompt", "EmptyChromaRadianceLatentImage"}
    kept |= {MEASURED, "DeltaConvSaveLocality"}
    short["nodes"] = [node for node in short["nodes"] if node["type"] in kept]
    ids = {node["id"] for node in short["nodes"]}
    short["links"] = [link for link in short["links"] if {link[1], link[3]} <= ids]
    short["groups"] = []
    for node in short["nodes"]:
        if node["type"] == "EmptyChromaRadianceLatentImage":
            node["widgets_values"][:2] = [32, 32]
        if node["type"] == MEASURED:
            node["widgets_values"][2] = "off"
        for slot in node["outputs"]:
            links = [link[0] for link in short["links"]]
            slot["links"] = [link for link in slot["links"] if link in links]
    return short


@pytest.fixture(scope="module", params=[CANVAS, NODES])
def page(request, browser, server):
    open_page(browser, server, Comfy_VueNodes_Enabled=request.param == NODES)
    return browser


def test_page_opens_the_workflow_as_the_converter_reads_it(page, server, workflow):
    load_workflow(page, workflow)
    theirs = in_page(page, "return (await app.graphToPrompt()).output")
    object_info = server.object_info()
    for node in theirs.values():
        groups = object_info[node["class_type"]]["input"]
        known = {name for group in groups.values() for name in group if isinstance(groups, dict)}
        node["inputs"] = {name: node["inputs"][name] for name in node["inputs"] if name in known}
    assert theirs == to_prompt(workflow, object_info)
    errors = in_page(page, "return app.graph.nodes.filter(node => node.has_errors).length")
    assert errors == 0
    saved = in_page(
        page,
        "return app.graph.serialize().nodes.find(n => n.type === arguments[0]).widgets_values",
        MEASURED,
    )
    values = next(n for n in workflow["nodes"] if n["type"] == MEASURED)["widgets_values"]
    assert saved == values


def pixels(page):
    """A number for what each canvas of the view shows, the picker first."""
    return in_page(
        page,
        """return [...document.querySelectorAll('.deltaconv-view canvas')].map(canvas => {
            const data = canvas.getContext('2d')
                .getImageData(0, 0, canvas.width, canvas.height).data;
            let sum = 0;
            data.forEach((value, index) => { sum = (sum * 31 + value * (index % 97)) % 1e9; });
            return sum;
        })""",
    )


def click(page, x, y):
    """A real click of the mouse at a fraction of the picker."""
    picker = page.find_element("css selector", ".deltaconv-view canvas.pick")
    size = picker.rect
    dx, dy = ((fraction - 0.5) * size[side] for fraction, side in ((x, "width"), (y, "height")))
    ActionChains(page).move_to_element_with_offset(picker, int(dx), int(dy)).click().perform()


def test_clicking_a_point_shows_its_attention_in_every_map(page, short):
    load_workflow(page, short)
    in_page(
        page,
        """const node = app.graph.nodes.find(node => node.type === arguments[0]);
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [120 - node.pos[0], -200 - node.pos[1]];
        app.canvas.setDirty(true, true);
        await app.queuePrompt(0);""",
        MEASURED,
    )
    WebDriverWait(page, 300).until(lambda _: len(pixels(page)) == 4)
    click(page, 0.28, 0.28)
    label = "return document.querySelector('.deltaconv-view').innerText"
    assert "Query at (0.28, 0.28)" in in_page(page, label)
    first = pixels(page)
    click(page, 0.78, 0.6)
    assert "Query at (0.78, 0.59)" in in_page(page, label)
    second = pixels(page)
    assert all(one != other for one, other in zip(first, second, strict=True))
    click(page, 0.28, 0.28)
    assert pixels(page) == first
    assert "32×32, 3 layers" in in_page(page, label)
    page.find_element("css selector", ".deltaconv-view button").click()
    points = in_page(
        page,
        """return app.graph.nodes.find(node => node.type === arguments[0])
            .widgets.find(widget => widget.name === 'points').value""",
        MEASURED,
    )
    assert points.split("\n")[-1] == "0.281, 0.281"
    # Opened again, as after a switch of tabs, it shows the same without a run, from the middle.
    click(page, 0.53, 0.53)
    middle = pixels(page)
    load_workflow(page, short)
    WebDriverWait(page, 60).until(lambda _: pixels(page) == middle)
    # Without its files, as after a restart of ComfyUI, it says what to do.
    in_page(
        page,
        """for (const name of Object.keys(sessionStorage).filter(n => n.startsWith('deltaconv')))
            sessionStorage.setItem(name, sessionStorage[name].replaceAll('.png', '.gone.png'));""",
    )
    load_workflow(page, short)
    WebDriverWait(page, 60).until(lambda _: "Run the node" in in_page(page, label))
