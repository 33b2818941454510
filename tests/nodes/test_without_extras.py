"""What the nodes do where ComfyUI's requirements are installed and nothing else."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.release import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPT = Path(__file__).parents[1] / "support" / "bare_nodes.py"
EXTRAS = {"matplotlib", "torchmetrics", "bitsandbytes"}


def needed(lines: list[str]) -> Iterator[Requirement]:
    for line in lines:
        if line.strip() and not line.startswith("#"):
            yield Requirement(line)


def brought(lines: list[str]) -> set[str]:
    """Names of all installed distributions that requirements bring, their own included."""
    found, open_ = set(), [(need, "") for need in needed(lines)]
    while open_:
        need, extra = open_.pop()
        name = canonicalize_name(need.name)
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        wanted = [(name, ""), *((name, one) for one in need.extras)]
        for key in wanted:
            if key not in found:
                found.add(key)
                try:
                    open_ += [(Requirement(line), key[1]) for line in requires(name) or []]
                except PackageNotFoundError:
                    continue
    return {name for name, _ in found}


def absent(tree: Path) -> set[str]:
    """Top-level modules of this environment that ComfyUI does not bring."""
    theirs = brought((tree / "requirements.txt").read_text(encoding="utf-8").splitlines())
    theirs |= {"deltaconv", "pip", "setuptools"}
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
    pictures = [*given["locality"][1:], given["recipe"][2], *given["evaluate"][1:3]]
    assert set(pictures) == {"Tensor"} and given["previews"] == ["Image"] * 3
    assert "LPIPS needs torchmetrics: pip install torchmetrics" in given["evaluate"][0]
    page = next((given["base"] / "output" / "deltaconv").glob("*.html"))
    assert "pip install matplotlib" in page.read_text(encoding="utf-8")


def test_what_the_templates_draw_with_is_installed_by_comfyui_manager():
    """Manager installs requirements.txt, a registry reads pyproject.toml: both name the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == project["dependencies"]
    assert "matplotlib" in {need.name for need in needed(project["dependencies"])}
    kept = {"torch", "torchvision", "numpy", "pillow", "triton"}
    assert not kept & {need.name for need in needed(project["dependencies"])}
