"""Blueprints: groups of nodes that ComfyUI offers to drop into a workflow."""

import json

import pytest
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page

FOLDER = ROOT / "subgraphs"
BLUEPRINTS = sorted(FOLDER.glob("*.json"))


def read(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    (graph,) = workflow["definitions"]["subgraphs"]
    return workflow, graph


@pytest.mark.any_comfyui
def test_the_server_offers_them(server):
    offered = [entry["name"] for entry in server.get("/global_subgraphs").values()]
    assert len(BLUEPRINTS) == 2
    assert {path.stem for path in BLUEPRINTS} <= set(offered)


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_links_join_what_the_nodes_have(server, path):
    workflow, graph = read(path)
    info, nodes = server.object_info(), {node["id"]: node for node in graph["nodes"]}
    for node in nodes.values():
        inputs = info[node["type"]]["input"]
        assert {slot["name"] for slot in node["inputs"]} == {
            name for part in ("required", "optional") for name in inputs.get(part, {})
        }
    for link in graph["links"]:
        if link["target_id"] in nodes:
            slot = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert slot["link"] == link["id"]
            if link["origin_id"] in nodes:
                source = info[nodes[link["origin_id"]]["type"]]["output"][link["origin_slot"]]
                assert source == slot["type"]
            else:
                assert graph["inputs"][link["origin_slot"]]["type"] == slot["type"]
        else:
            source = info[nodes[link["origin_id"]]["type"]]["output"][link["origin_slot"]]
            assert graph["outputs"][link["target_slot"]]["type"] == source
    (outer,) = workflow["nodes"]
    assert [slot["name"] for slot in outer["inputs"]] == [one["name"] for one in graph["inputs"]]


@pytest.mark.any_comfyui
def test_the_page_opens_them_as_one_node_and_runs_what_is_inside(browser, server):
    open_page(browser, server, Comfy_VueNodes_Enabled=False)
    for path in BLUEPRINTS:
        workflow, graph = read(path)
        load_workflow(browser, workflow)
        (title,) = in_page(browser, "return app.graph.nodes.map(node => node.title)")
        assert title == graph["name"]
        widgets = in_page(
            browser, "return app.graph.nodes[0].widgets.map(widget => [widget.name, widget.value])"
        )
        (outer,) = workflow["nodes"]
        promoted = [slot["name"] for slot in outer["inputs"] if "widget" in slot]
        assert dict(widgets) == dict(zip(promoted, outer["widgets_values"], strict=True))
        prompt = in_page(browser, "return (await app.graphToPrompt()).output")
        kinds = {node["class_type"] for node in prompt.values()}
        assert kinds == {node["type"] for node in graph["nodes"]}
        values = {name: value for node in prompt.values() for name, value in node["inputs"].items()}
        assert dict(widgets).items() <= values.items()
