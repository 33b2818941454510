"""What the demo workflow says in the page, with Apply bypassed as its note advises."""

import json

import pytest
from comfyui_deltaconv.deltaconv import demo, read_weights
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page
from comfyui_deltaconv.development.comfyui.workflow import to_prompt
from comfyui_deltaconv.development.demo import WORKFLOW
from selenium.webdriver.support.ui import WebDriverWait

RUN = """
const answer = new Promise(done => {
    app.api.addEventListener('execution_success', () => done('success'));
    app.api.addEventListener('execution_error', event => done(event.detail));
});
await app.queuePrompt(0);
return await answer
"""
WIDGET = """
const node = app.graph.nodes.find(node => (node.title || node.type) === arguments[0]);
return node.widgets.find(widget => widget.name === arguments[1])?.value ?? ''
"""


def bypassed(text):
    """The demo workflow with that prompt, small, one step, and Apply ΔConv bypassed."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 1  # steps
        if node["type"] == "EmptyChromaRadianceLatentImage":
            node["widgets_values"] = [16, 16, 1]
        if node["type"] == "DeltaConvApply":
            node["mode"] = 4
        if node.get("title") == "Prompt":
            node["widgets_values"] = [text]
    return workflow


def test_bypassed_apply_says_that_nothing_is_replaced(server):
    prompt = to_prompt(bypassed("red apple"), server.object_info())
    titles = {node["_meta"]["title"]: name for name, node in prompt.items()}
    (said,) = server.queue(prompt)["outputs"][titles["What was replaced"]]["text"]
    assert said.startswith("No layer is replaced: these are ΔConv weights for 10 layers")


# What a bypassed node passes on is the front end's, whichever way it draws.
@pytest.mark.parametrize(
    "vue", [False, pytest.param(True, marks=pytest.mark.any_comfyui)], ids=["canvas", "Vue nodes"]
)
def test_page_says_what_was_ignored_and_that_nothing_is_replaced(browser, server, vue):
    unknown = "zebrafish" if vue else "wombat"
    open_page(browser, server, Comfy_VueNodes_Enabled=vue)
    load_workflow(browser, bypassed(f"{unknown}, woman."))
    assert in_page(browser, RUN) == "success"

    def said(node, widget):
        return in_page(browser, WIDGET, node, widget)

    line = "$$node-text-preview"
    WebDriverWait(browser, 60).until(lambda _: said("Prompt", line))
    assert f"ignored: {unknown}." in said("Prompt", line)
    shown = "return document.body.innerText"
    WebDriverWait(browser, 60).until(lambda _: f"ignored: {unknown}." in in_page(browser, shown))
    WebDriverWait(browser, 60).until(lambda _: said("What was replaced", "preview_text"))
    assert said("What was replaced", "preview_text").startswith("No layer is replaced")


def test_weights_say_in_one_line_what_they_are():
    said = str(read_weights(demo.DELTACONV_PATH))
    assert "10 layers of emoji-demo" in said and "\n" not in said and len(said) < 200
