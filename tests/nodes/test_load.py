"""Load ΔConv Weights where there is no file yet: on the server, and on its page."""

import contextlib

import pytest
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page
from comfyui_deltaconv.development.comfyui.client import PromptRefused

NODES, CANVAS = "Vue nodes", "canvas"
OPTION = "none: put one into models/deltaconv"
WORKFLOW = {
    "version": 0.4,
    "last_node_id": 2,
    "last_link_id": 1,
    "nodes": [
        {
            "id": 1,
            "type": "DeltaConvLoad",
            "pos": [0, 0],
            "size": [460, 90],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [{"name": "deltaconv", "type": "DELTACONV", "links": [1]}],
            "properties": {},
        },
        {
            "id": 2,
            "type": "DeltaConvSave",
            "pos": [520, 0],
            "size": [300, 90],
            "flags": {},
            "order": 1,
            "mode": 0,
            "inputs": [{"name": "deltaconv", "type": "DELTACONV", "link": 1}],
            "outputs": [{"name": "file", "type": "STRING", "links": []}],
            "properties": {},
            "widgets_values": ["deltaconv"],
        },
    ],
    "links": [[1, 1, 0, 2, 0, "DELTACONV"]],
    "groups": [],
    "config": {},
    "extra": {},
}


@pytest.fixture
def empty(server):
    """The server without a ΔConv file; what other tests put there comes back."""
    with contextlib.ExitStack() as stack:
        for folder in ("models", "output"):
            files, aside = server.base / folder / "deltaconv", server.base / f"aside-{folder}"
            if files.is_dir():
                files.rename(aside)
                files.mkdir()
                stack.callback(aside.rename, files)
                stack.callback(files.rmdir)
        yield server


def prompt(file):
    inputs = {} if file is None else {"file": file}
    return {
        "1": {"class_type": "DeltaConvLoad", "inputs": inputs},
        "2": {
            "class_type": "DeltaConvSave",
            "inputs": {"deltaconv": ["1", 0], "filename_prefix": "deltaconv"},
        },
    }


def test_the_folder_is_made_at_start(server):
    assert (server.base / "models" / "deltaconv").is_dir()


def test_the_list_says_where_files_belong(empty):
    (kind, options) = empty.object_info()["DeltaConvLoad"]["input"]["required"]["file"]
    assert (options["options"] if kind == "COMBO" else kind) == [OPTION]


@pytest.mark.parametrize("file", [OPTION, "", "gone.safetensors"])
def test_a_run_without_a_file_is_refused_with_folder_and_source(empty, file):
    with pytest.raises(PromptRefused) as refused:
        empty.queue(prompt(file))
    sentence = str(refused.value)
    assert str(empty.base / "models" / "deltaconv") in sentence
    assert "7eu7d7/ConvFusion" in sentence and "README" in sentence
    assert not (empty.base / "output" / "deltaconv").exists() or not list(
        (empty.base / "output" / "deltaconv").iterdir()
    )


def test_a_file_of_another_kind_is_refused_before_anything_runs(empty):
    folder = empty.base / "models" / "deltaconv"
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(b"not safetensors at all")
    try:
        with pytest.raises(PromptRefused) as refused:
            empty.queue(prompt(damaged.name))
    finally:
        damaged.unlink()
    assert "damaged.safetensors" in str(refused.value) and "Expected" in str(refused.value)


def test_a_run_that_names_no_file_is_refused_without_a_traceback(empty):
    with pytest.raises(PromptRefused) as refused:
        empty.queue(prompt(None))
    assert "Required input is missing file" in str(refused.value)
    assert "positional argument" not in str(refused.value)


@pytest.mark.parametrize("renderer", [CANVAS, NODES])
def test_the_node_and_the_refusal_say_it_in_the_page(empty, browser, renderer):
    open_page(browser, empty, Comfy_VueNodes_Enabled=renderer == NODES)
    load_workflow(browser, WORKFLOW)
    values = in_page(
        browser,
        """return app.graph.nodes.find(node => node.type === "DeltaConvLoad")
            .widgets.map(widget => widget.value)""",
    )
    assert values == [OPTION]
    told = in_page(browser, "await app.queuePrompt(0); return JSON.stringify(app.lastNodeErrors)")
    assert str(empty.base / "models" / "deltaconv") in told and "7eu7d7/ConvFusion" in told
    assert "positional argument" not in told and "undefined" not in told
