"""What a refused distillation says on its node in the real page; test_walk.py runs one."""

import pytest
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page
from selenium.webdriver.support.ui import WebDriverWait
from small_distillation import DISTILL, SETTINGS, SMALL_RUN, small_distillation

LINE = f"""
const node = app.graph.nodes.find(node => node.type === '{DISTILL}');
return node.widgets.find(widget => widget.name === '$$node-text-preview')?.value ?? ''
"""


@pytest.fixture(scope="module")
def workflow():
    return small_distillation()


def with_widgets(browser, workflow, **values):
    """Open the workflow with these widgets of the distillation and its settings, and queue it."""
    load_workflow(browser, workflow)
    in_page(
        browser,
        f"""const node = app.graph.nodes.find(node => node.type === '{DISTILL}');
        const settings = LiteGraph.createNode('{SETTINGS}');
        app.graph.add(settings);
        settings.connect(0, node, node.inputs.findIndex(input => input.name === 'settings'));
        const widgets = [...node.widgets, ...settings.widgets];
        for (const [name, value] of Object.entries(arguments[0]))
            widgets.find(widget => widget.name === name).value = value;
        await app.queuePrompt(0);""",
        values,
    )


def wait_for(browser, words):
    WebDriverWait(browser, 300).until(lambda _: words in in_page(browser, LINE))
    return in_page(browser, LINE)


def test_an_error_leaves_no_line_of_another_run(browser, server, workflow):
    open_page(browser, server, Comfy_VueNodes_Enabled=False)
    many = {"samples": 100_000, "samples_mb": 1}
    with_widgets(browser, workflow, **{**SMALL_RUN, **many}, folder="x")
    said = wait_for(browser, "failed")
    assert said.startswith("failed before it began, folder x. Expected room for 100000 samples")


def test_a_new_node_keeps_its_seed(browser, server):
    open_page(browser, server, Comfy_VueNodes_Enabled=False)
    control = in_page(
        browser,
        """const node = LiteGraph.createNode(arguments[0]);
        return node.widgets.find(widget => widget.label === 'control after generate').value""",
        SETTINGS,
    )
    assert control == "fixed"
