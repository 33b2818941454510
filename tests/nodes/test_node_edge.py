"""What a node says on itself: its refusals as plain errors, what it did, where it wrote."""

import pytest
from comfyui_deltaconv.deltaconv import demo, read_weights
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page
from comfyui_deltaconv.development.comfyui.client import PromptFailed, PromptRefused
from comfyui_deltaconv.development.comfyui.workflow import to_prompt, without_others
from comfyui_deltaconv.development.demo import WORKFLOW
from selenium.webdriver.support.ui import WebDriverWait

TEXT = """
const node = app.graph.nodes.find(node => node.type === arguments[0]);
return node.widgets.find(widget => widget.name === '$$node-text-preview')?.value ?? ''
"""


@pytest.fixture
def shown(monkeypatch):
    """Every text that a node shows."""
    from comfyui_deltaconv.nodes import apply, load_save
    from comfyui_deltaconv.nodes.host import node_text

    texts = []
    for module in (apply, load_save, node_text):
        monkeypatch.setattr(module, "show_on_node", texts.append)
    return texts


def workflow(**widgets):
    """The demo workflow with these values of Apply ΔConv, by place."""
    import json

    found = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for node in found["nodes"]:
        if node["type"] == "DeltaConvApply":
            for place, value in widgets.items():
                node["widgets_values"][int(place[1:])] = value
    return found


def test_a_refusal_is_a_plain_error_and_stands_on_the_node(model, shown, folders):
    from comfyui_deltaconv.nodes.apply import DeltaConvApply
    from comfyui_deltaconv.nodes.load_save import DeltaConvLoad

    weights = read_weights(demo.DELTACONV_PATH)
    with pytest.raises(ValueError, match="the blocks would never act") as refused:
        DeltaConvApply.execute(model, weights, start_percent=0.5, end_percent=0.5)
    assert type(refused.value) is ValueError and shown == [str(refused.value)]
    with pytest.raises(FileNotFoundError, match="which is not there") as missing:
        DeltaConvLoad.execute("nowhere.safetensors")
    assert shown[1:] == [str(missing.value)]
    damaged = folders / "extra" / "damaged.safetensors"
    damaged.write_bytes(b"not safetensors")
    with pytest.raises(ValueError) as unreadable:
        DeltaConvLoad.execute(damaged.name)
    assert type(unreadable.value) is ValueError and shown[2:] == [str(unreadable.value)]


@pytest.mark.usefixtures("folders")
def test_apply_and_save_show_what_they_did(model, shown):
    from comfyui_deltaconv.nodes.apply import DeltaConvApply
    from comfyui_deltaconv.nodes.load_save import DeltaConvSave

    weights = read_weights(demo.DELTACONV_PATH)
    report = DeltaConvApply.execute(model, weights).args[1]
    assert shown[0].startswith("10 of 10 self-attention layers replaced\ncomputation per step ")
    # The report says more of each.
    for line in shown[0].splitlines():
        assert line.split(" for one ")[0] in report
    (file,) = DeltaConvSave.execute(weights, "mine/blocks").args
    assert shown[1] == f"saved as {file} in output/deltaconv"


@pytest.mark.any_comfyui
def test_saves_at_the_same_time_take_numbers_of_their_own(model, shown, folders):
    """As two ComfyUIs over one folder do."""
    from concurrent.futures import ThreadPoolExecutor

    from comfyui_deltaconv.nodes.load_save import DeltaConvSave

    weights = read_weights(demo.DELTACONV_PATH)
    with ThreadPoolExecutor(6) as pool:
        files = [pool.submit(DeltaConvSave.execute, weights, "both") for _ in range(6)]
        names = [file.result().args[0] for file in files]
    assert len(set(names)) == 6
    written = folders / "output" / "deltaconv"
    assert sorted(path.name for path in written.iterdir()) == sorted(names)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.6, 0.2), (-0.1, 1.0), (0.0, 1.5)])
def test_percents_that_cannot_be_are_refused_before_anything_runs(server, start, end):
    prompt = to_prompt(workflow(_0=start, _1=end), server.object_info())
    titles = {node["_meta"]["title"]: name for name, node in prompt.items()}
    # ComfyUI runs what does not depend on the refused node.
    with pytest.raises(PromptRefused) as refused:
        server.queue(without_others(prompt, titles["Student"]))
    assert "Expected" in str(refused.value) and f"start_percent={start}" in str(refused.value)


@pytest.mark.any_comfyui
def test_what_goes_wrong_is_no_error_of_ours_to_look_up(server):
    prompt = to_prompt(workflow(_2="nothing of this name"), server.object_info())
    with pytest.raises(PromptFailed) as failed:
        server.queue(prompt)
    assert failed.value.detail["exception_type"] == "ValueError"
    assert "Expected" in failed.value.detail["exception_message"]


@pytest.mark.any_comfyui
def test_the_page_shows_the_sentence_on_the_node(browser, server):
    open_page(browser, server, Comfy_VueNodes_Enabled=False)
    load_workflow(browser, workflow(_2="nothing of this name"))
    in_page(browser, "await app.queuePrompt(0)")
    WebDriverWait(browser, 60).until(
        lambda _: in_page(browser, TEXT, "DeltaConvApply").startswith("Expected")
    )
