"""The demo workflow: as the page opens it, as the API runs it, and that both are one prompt."""

import json

import pytest
from comfyui_deltaconv.development import DevelopmentError
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page
from comfyui_deltaconv.development.comfyui.workflow import links, to_prompt, without_others
from comfyui_deltaconv.development.demo import WORKFLOW, Graph

NODES, CANVAS = "Vue nodes", "canvas"


@pytest.fixture(scope="module")
def workflow():
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=[CANVAS, NODES])
def opened(request, browser, server):
    open_page(browser, server, Comfy_VueNodes_Enabled=request.param == NODES)
    return browser


@pytest.fixture
def page(opened, workflow):
    """The page with the demo workflow open, in both of its renderers."""
    load_workflow(opened, workflow)
    return opened


def known_inputs(prompt, object_info):
    """The prompt without inputs that only the page knows: the server never sees their widgets."""
    for node in prompt.values():
        groups = object_info[node["class_type"]]["input"]
        names = {name for group in ("required", "optional") for name in groups.get(group, {})}
        node["inputs"] = {name: node["inputs"][name] for name in node["inputs"] if name in names}
    return prompt


def test_page_and_converter_make_the_same_prompt(page, server, workflow):
    theirs = in_page(page, "return (await app.graphToPrompt()).output")
    object_info = server.object_info()
    assert known_inputs(theirs, object_info) == to_prompt(workflow, object_info)


@pytest.mark.parametrize("mode", [2, 4], ids=["muted", "bypassed"])
@pytest.mark.parametrize("node", ["DeltaConvApply", "VAEDecode", "DeltaConvCompare"])
# The renderer only draws a mode: one is enough.
@pytest.mark.parametrize("opened", [CANVAS], indirect=True)
def test_page_and_converter_agree_about_modes(opened, server, workflow, node, mode):
    changed = json.loads(json.dumps(workflow))
    next(n for n in changed["nodes"] if n["type"] == node)["mode"] = mode
    load_workflow(opened, changed)
    theirs = in_page(opened, "return (await app.graphToPrompt()).output")
    object_info = server.object_info()
    assert known_inputs(theirs, object_info) == to_prompt(changed, object_info)


def red_nodes(page):
    """Titles of the nodes that the page draws red: unknown types, or marked with an error."""
    return in_page(
        page,
        """return app.graph.nodes
            .filter(node => node.has_errors || !LiteGraph.registered_node_types[node.type])
            .map(node => node.title)""",
    )


def dialogs(page):
    """What the page says in dialogs over the canvas, where it tells of missing nodes and models."""
    return in_page(
        page,
        """return [...document.querySelectorAll('[role=dialog], .p-dialog')]
            .filter(element => element.offsetParent).map(element => element.innerText)""",
    )


def test_page_opens_it_without_red_nodes(page, workflow):
    assert in_page(page, "return app.graph.nodes.length") == len(workflow["nodes"])
    assert red_nodes(page) == [] and dialogs(page) == []


def test_a_missing_node_would_be_red(page, workflow):
    changed = json.loads(json.dumps(workflow))
    changed["nodes"][0] |= {"type": "NoSuchNode", "title": "missing"}
    load_workflow(page, changed)
    assert red_nodes(page) == ["missing"]
    in_page(page, "document.querySelectorAll('.p-dialog-close-button').forEach(b => b.click())")


def test_every_link_of_the_file_fits_its_ends(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, origin, output, target, slot, _ in workflow["links"]:
        assert link in nodes[origin]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
    inputs = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"]]
    assert sorted(inputs) == sorted(link[0] for link in workflow["links"])


@pytest.fixture(scope="module")
def small(server):
    """The demo's prompt at its smallest: one step, and its graph."""
    graph = Graph.read(server.object_info())
    return graph, graph.with_inputs("red apple", steps=1)


def test_demo_workflow_runs_through_the_api(server, small):
    graph, prompt = small
    seen = []
    history = server.queue(prompt, on_event=lambda event, detail: seen.append(event))
    assert history["status"]["status_str"] == "success"
    assert "progress" in seen or "progress_state" in seen
    for node in graph.previews.values():
        (image,) = history["outputs"][node]["images"]
        assert server.view(image).startswith(b"\x89PNG")


def test_pictures_differ_only_by_the_applied_node(small):
    graph, prompt = small
    teacher, student = (prompt[node]["inputs"] for node in graph.samplers.values())
    assert teacher.pop("model") != student.pop("model")
    assert teacher == student


def test_part_of_a_prompt_is_closed(small):
    graph, prompt = small
    part = without_others(prompt, graph.previews["teacher"])
    assert graph.samplers["teacher"] in part and graph.samplers["student"] not in part
    assert all(source in part for node in part.values() for source, _ in links(node).values())


def test_unknown_node_is_named(server, workflow):
    workflow = {"nodes": [{"id": 1, "type": "NoSuchNode"}], "links": []}
    with pytest.raises(DevelopmentError, match="got 'NoSuchNode'"):
        to_prompt(workflow, server.object_info())


def test_template_browser_offers_them(server):
    workflows = sorted(WORKFLOW.parent.glob("*.json"))
    offered = server.get("/api/workflow_templates")["deltaconv"]
    assert sorted(offered) == [path.stem for path in workflows]
    for path in workflows:
        thumbnail = server.fetch(f"/api/workflow_templates/deltaconv/{path.stem}.jpg")
        assert thumbnail == path.with_suffix(".jpg").read_bytes()


# Nodes whose files are the user's own: the templates name those that the note asks for.
LOADERS = {"CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "VAELoader"}
TEMPLATES = sorted(WORKFLOW.parent.glob("*.json"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_what_the_nodes_take(server, path):
    """Every node is known, every value is one that it offers, and every link joins like types."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    object_info = server.object_info()
    prompt = to_prompt(workflow, object_info)
    for node in prompt.values():
        info = object_info[node["class_type"]]
        entries = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert node["inputs"].keys() <= entries.keys()
        assert info["input"].get("required", {}).keys() <= node["inputs"].keys()
        for name, value in node["inputs"].items():
            kind, *options = entries[name]
            if isinstance(value, list):
                source = object_info[prompt[value[0]]["class_type"]]
                assert "*" in (kind, source["output"][value[1]]) or (
                    source["output"][value[1]] == kind
                ), name
            elif node["class_type"] not in LOADERS:
                choices = kind if isinstance(kind, list) else (options or [{}])[0].get("options")
                assert choices is None or value in choices, (path.stem, name, value)
    # Ids and places of links are those of the nodes.
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, slot, target, place, _ in workflow["links"]:
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == number


@pytest.mark.any_comfyui
def test_templates_open_with_no_red_node_but_for_files_of_the_user(browser, server):
    open_page(browser, server, Comfy_VueNodes_Enabled=False)
    for path in TEMPLATES:
        load_workflow(browser, json.loads(path.read_text(encoding="utf-8")))
        titles = {"Load Checkpoint", "Load Diffusion Model", "Load CLIP", "Load VAE"}
        assert set(red_nodes(browser)) <= titles, path.stem


def test_every_template_tells_what_to_do_in_a_note():
    for path in TEMPLATES:
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        notes = [node for node in nodes if node["type"] == "MarkdownNote"]
        assert notes and "*Run*" in notes[0]["widgets_values"][0], path.stem


def test_what_app_mode_shows_is_there(server):
    """The page leaves out what a workflow names and does not have."""
    object_info, shown = server.object_info(), 0
    for path in TEMPLATES:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        kinds = {str(node["id"]): node["type"] for node in workflow["nodes"]}
        form = workflow["extra"].get("linearData", {"inputs": [], "outputs": []})
        for node, widget in form["inputs"]:
            entries = object_info[kinds[node]]["input"]
            (_, *options) = next(part[widget] for part in entries.values() if widget in part)
            # Advanced ones are named there without a field.
            assert not (options[0] if options else {}).get("advanced"), (path.stem, widget)
        assert all(object_info[kinds[node]]["output_node"] for node in form["outputs"])
        shown += bool(form["inputs"] and form["outputs"])
    assert shown >= 4
