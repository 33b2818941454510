"""What the nodes do where ComfyUI's requirements are installed and nothing else."""

import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.comfyui.tree import (
    NEWEST,
    OLDEST,
    TORCH_PACKAGES,
    chosen_tree,
    front_end_pin,
    requirements,
)
from comfyui_deltaconv.development.lean import closure, required
from comfyui_deltaconv.development.release import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

SCRIPT = Path(__file__).parents[1] / "support" / "bare_nodes.py"
FRONT_END = "comfyui-frontend-package"
EXTRAS = {"matplotlib", "torchmetrics", "bitsandbytes"}


def absent(tree: Path) -> set[str]:
    """Top-level modules of this environment that ComfyUI does not bring."""
    # The environment is made for one of the ComfyUIs: another one may ask for more.
    brought = closure([*TORCH_PACKAGES, *requirements(tree)], skip_missing=True)
    theirs = brought.keys() | {"deltaconv", "pip", "setuptools"}
    return {
        module
        for module, distributions in packages_distributions().items()
        if not theirs & set(map(canonicalize_name, distributions))
    }


@pytest.fixture
def given(comfyui_tree, tmp_path):
    """What every node gave in a process that finds nothing but what ComfyUI brings."""
    modules = absent(comfyui_tree)
    # Each is installed here, so what was found without it was found without looking.
    assert modules >= EXTRAS and not modules & {"torch", "scipy", "PIL", "kornia", "transformers"}
    base = tmp_path
    line = [sys.executable, "-I", SCRIPT, comfyui_tree, base, ",".join(sorted(modules))]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert not answer["loaded"]
    return {**answer["given"], "base": base}


@pytest.mark.any_comfyui
def test_every_node_gives_its_outputs_and_says_what_is_missing(given):
    assert "middle" in given["locality"][0]
    assert ": replace kernel=" in given["recipe"][1]
    assert "PSNR" in given["compare"][1]
    assert "2 steps" in given["distill"][1] and len(given["distill"][0]["loss"]) == 2
    assert "sigma" in given["evaluate"][0]
    assert "16" in given["benchmark"][0]
    assert given["choose"][1].startswith("- balanced: blocks in ")
    pictures = [*given["locality"][1:], given["recipe"][2], *given["evaluate"][1:3]]
    pictures.append(given["choose"][0])
    assert set(pictures) == {"Tensor"} and given["previews"] == ["Image"] * 3
    assert "LPIPS needs torchmetrics: pip install torchmetrics" in given["evaluate"][0]
    page = next((given["base"] / "output" / "deltaconv").glob("*.html"))
    assert "pip install matplotlib" in page.read_text(encoding="utf-8")


def test_what_the_templates_draw_with_is_installed_by_comfyui_manager():
    """Manager installs requirements.txt, a registry reads pyproject.toml: both name the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    # The front end is ComfyUI's own; a registry reads its range here and does not install it.
    (front_end,) = [one for one in project["dependencies"] if one.startswith(FRONT_END)]
    stated = [line for line in lines if line and not line.startswith("#")]
    assert [*stated, front_end] == project["dependencies"]
    pins = [front_end_pin(release.tree) for release in (OLDEST, NEWEST)]
    assert Requirement(front_end).specifier == SpecifierSet(f">={pins[0]}")
    assert all(Requirement(front_end).specifier.contains(pin) for pin in pins)
    names = {Requirement(line).name for line in project["dependencies"]}
    assert "matplotlib" in names
    assert not names & {"torch", "torchvision", "numpy", "pillow", "triton"}


def test_what_comes_with_the_pack_asks_for_no_other_version_of_what_is_there():
    """So pip adds it and leaves the rest as it is; torch least of all."""
    theirs = [*TORCH_PACKAGES, *requirements(chosen_tree())]
    before, after = closure(theirs), required(chosen_tree())
    added = after.keys() - before.keys()
    assert "matplotlib" in added and len(added) < 12
    for name in added:
        for line in after[name].requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                there = after[canonicalize_name(wanted.name)].version
                assert wanted.specifier.contains(there, prereleases=True), f"{name}: {line}"
