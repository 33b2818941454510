"""A script in a name or a prompt stays text: on the page's nodes, and in a saved report."""

import base64
import json

import pytest
from comfyui_deltaconv.deltaconv.locality.html_page import report_html
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page
from comfyui_deltaconv.development.demo import WORKFLOW
from locality_reports import small_report
from selenium.webdriver.support.ui import WebDriverWait

# Runs as HTML, and asks another host as Markdown.
SCRIPT = (
    "<img src=x onerror='window.ran=1'><script>window.ran=1</script>![x](//other.invalid/x_y_z)"
)
# The innermost elements with a text, and what of them is no text.
FOUND = """
const having = each => each.textContent.includes(arguments[0]);
return [...document.querySelectorAll('body *')]
    .filter(each => having(each) && ![...each.children].some(having))
    .map(each => [each.textContent, each.querySelectorAll('img, script').length]);
"""


@pytest.fixture(params=["canvas", "Vue nodes"])
def page(request, browser, server):
    open_page(browser, server, Comfy_VueNodes_Enabled=request.param == "Vue nodes")
    return browser


def test_a_script_in_an_input_is_shown_as_text(page):
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    (apply,) = (node for node in workflow["nodes"] if node["type"] == "DeltaConvApply")
    apply["widgets_values"][2] = SCRIPT
    load_workflow(page, workflow)
    in_page(page, "window.ran = undefined; await app.queuePrompt(0)")
    found = WebDriverWait(page, 60).until(
        lambda _: in_page(page, FOUND, "Expected sites of this model")
    )
    assert all(SCRIPT in text and not elements for text, elements in found)
    assert in_page(page, "return window.ran ?? null") is None


@pytest.mark.any_comfyui
def test_scripts_in_a_report_are_shown_as_text(browser):
    """In every place of it that a file or a model may name; a comment would hide the rest."""
    report = small_report(path=f"blocks.0.{SCRIPT}", family=f"</title><!--<script>{SCRIPT}")
    report.left_out[f"-->{SCRIPT}"] = f"</script><!--<script>{SCRIPT}"
    report.source = f"<!--<script>{SCRIPT}"
    page = base64.b64encode(report_html(report).encode()).decode()
    browser.get(f"data:text/html;charset=utf-8;base64,{page}")
    ran, title, text, data, elements = browser.execute_script(
        "return [window.ran ?? null, document.title, document.body.innerText,"
        "document.getElementById('report').textContent,"
        "document.querySelectorAll('script, img:not([src^=\"data:\"])').length]"
    )
    assert ran is None and elements == 1
    assert SCRIPT in title and SCRIPT in text
    assert json.loads(data) == json.loads(report.to_json())
