"""What the demo workflow says with Apply bypassed; test_walk.py looks at it in the page."""

import json

from comfyui_deltaconv.deltaconv import demo, read_weights
from comfyui_deltaconv.development.comfyui.workflow import to_prompt
from comfyui_deltaconv.development.demo import WORKFLOW


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


def test_weights_say_in_one_line_what_they_are():
    said = str(read_weights(demo.DELTACONV_PATH))
    assert "10 layers of emoji-demo" in said and "\n" not in said and len(said) < 200
