"""The nodes in a server that finds what ComfyUI and the pack require, and nothing else.

All tests with a server run there; here is that it is so, and what no other one runs whole.
"""

import json
import subprocess

import pytest
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.comfyui.tree import chosen_tree
from comfyui_deltaconv.development.comfyui.workflow import to_prompt
from comfyui_deltaconv.development.demo_locality import WORKFLOW
from comfyui_deltaconv.development.lean import lean_python, required


@pytest.fixture(scope="module")
def found():
    """Names of the distributions that the lean Python sees, and which of some modules it finds."""
    code = """
import importlib.util, json
from importlib.metadata import distributions
from pathlib import Path
modules = ("torch", "torchaudio", "scipy", "huggingface_hub", "pytest", "torchmetrics", "pip")
print(json.dumps([
    [Path(one._path).name for one in distributions()],
    [name for name in modules if importlib.util.find_spec(name)],
]))"""
    line = [str(lean_python()), "-I", "-c", code]
    return json.loads(subprocess.run(line, capture_output=True, check=True).stdout)


def test_it_holds_what_is_required_and_no_more(found):
    installed, modules = found
    assert len(installed) == len(required(chosen_tree()))
    assert modules == ["torch", "torchaudio", "scipy", "huggingface_hub"]


def test_the_server_runs_in_it_and_lists_every_node(server):
    (python,) = server.process.args[:1]
    assert python == str(lean_python())
    documented = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    listed = {name for name in server.object_info() if name.startswith("DeltaConv")}
    assert listed == documented


@pytest.mark.any_comfyui
def test_the_locality_workflow_draws_its_points(server):
    before = len(server.said())
    prompt = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info())
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    nodes["EmptyChromaRadianceLatentImage"] |= {"width": 16, "height": 16}
    assert "0.3, 0.25" in nodes["DeltaConvLocality"]["points"]
    entry = server.queue(prompt)
    assert entry["status"]["completed"]
    pictures = [name for name, node in prompt.items() if node["class_type"] == "PreviewImage"]
    assert all(entry["outputs"][name]["images"] for name in pictures) and len(pictures) == 4
    assert "ModuleNotFoundError" not in server.said()[before:]
