"""The distillation's template cut down to a model and a run that lasts as long as it is let."""

import json

from comfyui_deltaconv.development import ROOT

DISTILL, SETTINGS = "DeltaConvDistill", "DeltaConvDistillSettings"
# Widgets of both.
SMALL_RUN = {
    "prompts": "octopus",
    "layer_steps": 100_000,
    "joint_steps": 0,
    "batch_size": 1,
    "samples": 1,
    "sample_size": 16,
    "initialization": "random",
    "choice": "fastest",
    "minutes": 0,
    "preview_every": 0,
    "save_every": 5,
}


def small_distillation() -> dict:
    """The distillation's template, its model and node alone, on small samples of its own."""
    workflow = json.loads((ROOT / "workflows" / "6_distill_your_own.json").read_text("utf-8"))
    kept = {"DeltaConvDemoModel", "DeltaConvDemoPrompt", DISTILL, "LossGraphNode"}
    workflow["nodes"] = [node for node in workflow["nodes"] if node["type"] in kept]
    ids = {node["id"] for node in workflow["nodes"]}
    links = [link for link in workflow["links"] if {link[1], link[3]} <= ids]
    workflow["links"], workflow["groups"] = links, []
    known = {link[0] for link in links}
    for node in workflow["nodes"]:
        for slot in node["outputs"]:
            slot["links"] = [link for link in slot["links"] or [] if link in known]
    return workflow
