"""Distillation as a graph in a real ComfyUI server: all its sockets, interrupted, gone on with."""

import threading

import pytest
from comfyui_deltaconv.development.client import PromptFailed


def graph(server, folder, layer_steps):
    """Demo model → Distill → loss graph, saved weights, evaluation's pictures."""
    widgets = server.object_info()["DeltaConvDistill"]["input"]
    defaults = {
        name: entry[1]["default"]
        for name, entry in {**widgets["required"], **widgets.get("optional", {})}.items()
        if "default" in entry[1]
    }
    distill = {
        **defaults,
        "model": ["model", 0],
        "latents": ["latent", 0],
        "positive": ["prompt", 0],
        "unconditional": ["empty", 0],
        "layer_steps": layer_steps,
        "joint_steps": 0,
        "batch_size": 1,
        "initialisation": "random",
        "folder": folder,
        "save_every": 5,
        "preview_every": 2,
    }
    nodes = {
        "model": ("DeltaConvDemoModel", {}),
        "prompt": ("DeltaConvDemoPrompt", {"text": "red apple"}),
        "empty": ("DeltaConvDemoPrompt", {"text": ""}),
        "latent": (
            "EmptyChromaRadianceLatentImage",
            {"width": 16, "height": 16, "batch_size": 1},
        ),
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


def test_every_socket_of_the_distillation_graph_works(server):
    entry = server.queue(graph(server, "whole", 3))
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
        server.queue(graph(server, "stopped", 100_000), on_event=watch)
    thread.join()
    assert stopped.value.event == "execution_interrupted"
    values = []

    def progress(event, detail):
        if event == "progress" and detail["node"] == "distill":
            values.append(detail["value"])

    reached = max(seen)
    server.queue(graph(server, "stopped", reached + 10), on_event=progress)
    assert min(values) >= reached
