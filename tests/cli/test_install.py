"""The pack as a user gets it: the registry's archive in a ComfyUI, and a wheel.

Neither has development/ or tests/, and the Python that runs them has what ComfyUI and the pack
require and nothing else.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser

import pytest
import yaml
from comfyui_deltaconv.deltaconv import read_weights
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.comfyui.server import FOLDERS, running
from comfyui_deltaconv.development.comfyui.workflow import to_prompt
from comfyui_deltaconv.development.lean import lean_python

ABSENT = {"development", "tests", "dev.py", ".ci", ".github"}


def tracked(*options):
    """Paths that git lists in the repository."""
    line = ["git", "ls-files", "-z", *options]
    listed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {path for path in listed.split("\0") if path and (ROOT / path).is_file()}


def copied(paths, folder):
    """`folder` with those files of the repository."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    return folder


def run(line, folder, **environment):
    """What a program says, in a process that finds nothing of this repository."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COMFYUI", "PYTHON"))}
    done = subprocess.run(
        list(map(str, line)),
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def comfyui(comfyui_tree, tmp_path_factory):
    """A ComfyUI's folder with the pack's archive unpacked in custom_nodes."""
    folder = tmp_path_factory.mktemp("comfyui")
    for entry in comfyui_tree.iterdir():
        if entry.name not in FOLDERS:
            (folder / entry.name).symlink_to(entry)
    # As comfy-cli packs it for the registry: what git tracks, without what .comfyignore names.
    archive = tracked() - tracked("-ci", "--exclude-from=.comfyignore")
    pack = copied(archive, folder / "custom_nodes" / "deltaconv")
    assert not ABSENT & {path.name for path in pack.iterdir()}
    return folder


@pytest.fixture(scope="module")
def command(comfyui):
    """Runs `python -m custom_nodes.FOLDER.cli …` in ComfyUI's folder → what it says."""

    def run_command(*arguments, folder="deltaconv"):
        return run([lean_python(), "-m", f"custom_nodes.{folder}.cli", *arguments], comfyui)

    return run_command


def test_all_nodes_have_help_and_the_demo_runs_to_its_end(comfyui, comfyui_tree):
    pack = comfyui / "custom_nodes" / "deltaconv"
    workflow = json.loads((pack / "workflows" / "1_demo.json").read_text(encoding="utf-8"))
    with running(comfyui_tree, base=comfyui, python=lean_python()) as server:
        assert not pack.is_symlink()
        info = server.object_info()
        nodes = {name for name in info if name.startswith("DeltaConv")}
        assert nodes == {path.stem for path in (pack / "web" / "docs").glob("*.md")}
        assert nodes == {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
        prompt = to_prompt(workflow, info)
        for node in prompt.values():
            if node["class_type"] == "KSampler":
                node["inputs"]["steps"] = 1
            if node["class_type"] == "EmptyChromaRadianceLatentImage":
                node["inputs"] |= {"width": 16, "height": 16}
        assert server.queue(prompt)["status"]["completed"]
    assert list((comfyui / "output" / "deltaconv").glob("demo_*.png"))


@pytest.mark.any_comfyui
def test_the_self_test_and_the_benchmark_run(command):
    assert command("selftest", "--seconds", "1").endswith("No wrong results.\n")
    assert "6929 ×" in command("bench", "--flops")


@pytest.mark.any_comfyui
def test_distill_finds_the_comfyui_that_it_lies_in(command, comfyui, tmp_path):
    stages = {"layers": {"steps": 2, "batch": 1}, "joint": {"steps": 0}}
    entries = {
        "recipe": {"middle_block.1.transformer_blocks.0.attn1": 3},
        "settings": {"init": "random", **stages},
    }
    config = comfyui / "tiny.yaml"
    config.write_text(yaml.safe_dump(entries), encoding="utf-8")
    # A name that no import statement could hold, of a link that leads elsewhere.
    shutil.copytree(comfyui / "custom_nodes" / "deltaconv", tmp_path / "pack")
    (comfyui / "custom_nodes" / "Delta-Conv").symlink_to(tmp_path / "pack")
    assert "Weights:" in command("distill", "--config", config.name, folder="Delta-Conv")
    weights = read_weights(comfyui / "output" / "distill" / "deltaconv.safetensors")
    assert weights.training["steps"] == 2


def test_a_wheel_holds_the_command_and_the_data(tmp_path):
    source = copied(tracked(), tmp_path / "source")
    line = [sys.executable, "-I", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*line, "--no-index", "--wheel-dir", tmp_path, source], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    (package,) = tmp_path.glob("site/comfyui_deltaconv")
    # setuptools takes every module beside the package's own __init__.py.
    assert not (ABSENT - {"dev.py"}) & {path.name for path in package.iterdir()}
    for folder in ("benchmarks", "cli", "deltaconv", "kernels", "nodes"):
        modules = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
        assert modules == {path.relative_to(package) for path in (package / folder).rglob("*.py")}
    data = {path.name for path in (ROOT / "deltaconv" / "data").iterdir()}
    assert data == {path.name for path in (package / "deltaconv" / "data").iterdir()}
    assert (package / "deltaconv" / "published.json").is_file()
    entry = ConfigParser()
    entry.read(next(tmp_path.glob("site/*.dist-info/entry_points.txt")), encoding="utf-8")
    assert dict(entry["console_scripts"]) == {"deltaconv": "comfyui_deltaconv.cli.__main__:main"}
    line = [lean_python(), "-m", "comfyui_deltaconv.cli", "--help"]
    assert "selftest" in run(line, tmp_path, PYTHONPATH=str(tmp_path / "site"))
