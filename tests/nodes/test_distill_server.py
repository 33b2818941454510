"""Distillation as a graph in a real ComfyUI server: all its sockets, interrupted, gone on with."""

import json
import threading

import pytest
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page
from comfyui_deltaconv.development.comfyui.client import PromptFailed
from comfyui_deltaconv.development.comfyui.workflow import to_prompt

WORKFLOW = ROOT / "workflows" / "6_distill_your_own.json"


def defaults_of(server, node):
    """The widgets of a new node."""
    inputs = server.object_info()[node]["input"]
    return {
        name: entry[1]["default"]
        for name, entry in {**inputs["required"], **inputs.get("optional", {})}.items()
        if "default" in entry[1]
    }


def graph(server, folder, layer_steps, preview_every=0, choice="fastest"):
    """Demo model → Distill → loss graph, saved weights, evaluation's pictures."""
    settings = {
        **defaults_of(server, "DeltaConvDistillSettings"),
        "positive": ["prompt", 0],
        "unconditional": ["empty", 0],
        "layer_steps": layer_steps,
        "joint_steps": 0,
        "batch_size": 1,
        "initialization": "random",
        "save_every": 5,
        "preview_every": preview_every,
    }
    distill = {
        **defaults_of(server, "DeltaConvDistill"),
        "model": ["model", 0],
        "latents": ["latent", 0],
        "settings": ["settings", 0],
        "minutes": 0,
        "folder": folder,
        "choice": choice,
    }
    nodes = {
        "model": ("DeltaConvDemoModel", {}),
        "prompt": ("DeltaConvDemoPrompt", {"text": "red apple"}),
        "empty": ("DeltaConvDemoPrompt", {"text": ""}),
        "latent": (
            "EmptyChromaRadianceLatentImage",
            {"width": 16, "height": 16, "batch_size": 1},
        ),
        "settings": ("DeltaConvDistillSettings", settings),
        "distill": ("DeltaConvDistill", distill),
        "loss": ("LossGraphNode", {"loss": ["distill", 1], "filename_prefix": "loss"}),
        "save": ("DeltaConvSave", {"deltaconv": ["distill", 0], "filename_prefix": folder}),
        "evaluate": (
            "DeltaConvEvaluate",
            {
                "model": ["model", 0],
                "deltaconv": ["distill", 0],
                "positive": ["prompt", 0],
                "negative": ["empty", 0],
                "latent": ["latent", 0],
                "seeds": "1",
                "steps": 2,
                "cfg": 4.0,
                "levels": 2,
            },
        ),
        "plot": ("PreviewImage", {"images": ["evaluate", 1]}),
        "grid": ("PreviewImage", {"images": ["evaluate", 2]}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


@pytest.mark.any_comfyui
def test_every_socket_of_the_distillation_graph_works(server):
    entry = server.queue(graph(server, "whole", 3, preview_every=2, choice="balanced"))
    assert entry["status"]["completed"]
    assert {"loss", "plot", "grid"} <= entry["outputs"].keys()
    assert "whole_00001_.safetensors" in str(
        server.object_info()["DeltaConvLoad"]["input"]["required"]["file"]
    )


def test_interrupted_graph_saves_and_goes_on(server):
    stepping = threading.Event()
    seen = []

    def watch(event, detail):
        if event == "progress" and detail["node"] == "distill":
            seen.append(detail["value"])
            if len(seen) >= 3:
                stepping.set()

    def interrupt():
        assert stepping.wait(120)
        server.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(PromptFailed) as stopped:
        # ComfyUI tells of every 200th part, so of every third step.
        server.queue(graph(server, "stopped", 600), on_event=watch)
    thread.join()
    assert stopped.value.event == "execution_interrupted"
    values = []

    def progress(event, detail):
        if event == "progress" and detail["node"] == "distill":
            values.append(detail["value"])

    reached = max(seen)
    server.queue(graph(server, "stopped", reached + 10), on_event=progress)
    assert min(values) >= reached


@pytest.fixture(scope="module")
def workflow():
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "Vue nodes"])
def test_page_opens_the_workflow_as_the_converter_reads_it(browser, server, workflow, vue):
    open_page(browser, server, Comfy_VueNodes_Enabled=vue)
    load_workflow(browser, workflow)
    theirs = in_page(browser, "return (await app.graphToPrompt()).output")
    object_info = server.object_info()
    ours = to_prompt(workflow, object_info)
    assert theirs.keys() == ours.keys()
    for node, prompt in ours.items():
        # The page's own widgets are not the server's.
        inputs = {name: theirs[node]["inputs"][name] for name in prompt["inputs"]}
        assert (theirs[node]["class_type"], inputs) == (prompt["class_type"], prompt["inputs"])
    assert in_page(browser, "return app.graph.nodes.filter(n => n.has_errors).length") == 0


@pytest.mark.any_comfyui
def test_the_workflow_distils_saves_and_compares(server, workflow):
    prompt = to_prompt(workflow, server.object_info())
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    version = server.get("/system_stats")["system"]["comfyui_version"]
    # By the steps of settings, which the workflow leaves to its time.
    distill = nodes["DeltaConvDistill"]
    distill |= {"minutes": 0, "prompts": "red apple\noctopus", "settings": ["settings", 0]}
    settings = defaults_of(server, "DeltaConvDistillSettings")
    settings |= {"layer_steps": 2, "joint_steps": 2, "batch_size": 2}
    settings |= {"samples": 2, "sample_size": 16, "initialization": "random"}
    prompt["settings"] = {"class_type": "DeltaConvDistillSettings", "inputs": settings}
    nodes["EmptyChromaRadianceLatentImage"] |= {"width": 16, "height": 16}
    nodes["DeltaConvEvaluate"] |= {"steps": 2, "levels": 2, "seeds": "1"}
    if tuple(map(int, version.split(".")[:2])) < (0, 30):
        settings["joint_steps"] = 0
    entry = server.queue(prompt)
    assert entry["status"]["completed"]
    shown = {prompt[node]["class_type"] for node in entry["outputs"]}
    assert {"LossGraphNode", "PreviewImage", "PreviewAny"} <= shown
    weights = server.object_info()["DeltaConvLoad"]["input"]["required"]["file"]
    assert "distilled_00001_.safetensors" in str(weights)
