"""The pack as a user gets it: the registry's archive in a clean ComfyUI, and a wheel.

Neither has development/ or tests/, and the Python that runs them has what ComfyUI and the pack
require and nothing else.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser

import pytest
import yaml
from comfyui_deltaconv.deltaconv import read_weights
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.comfyui.server import FOLDERS, PACK, running
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
def archive(tmp_path_factory):
    """The archive as comfy-cli packs it for the registry: what git tracks, less .comfyignore."""
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in sorted(tracked() - tracked("-ci", "--exclude-from=.comfyignore")):
            packed.write(ROOT / name, name)
    return path


@pytest.fixture(scope="module")
def installed(comfyui_tree, archive, tmp_path_factory):
    """A ComfyUI's folder with the archive unpacked in custom_nodes, and pip's list before that."""
    folder = tmp_path_factory.mktemp("comfyui")
    for entry in comfyui_tree.iterdir():
        if entry.name not in FOLDERS:
            (folder / entry.name).symlink_to(entry)
    before = frozen()
    pack = folder / "custom_nodes" / PACK
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(pack)
    # What ComfyUI-Manager runs next; with --no-index pip fails where it would bring anything.
    pip("install", "--no-index", "--disable-pip-version-check", "-r", pack / "requirements.txt")
    return folder, before


def pip(*arguments):
    """What pip says that acts on the environment of the servers."""
    line = [sys.executable, "-I", "-m", "pip", "--python", lean_python(), *arguments]
    return run(line, ROOT.parent)


def frozen():
    return pip("freeze", "--all").splitlines()


@pytest.fixture(scope="module")
def comfyui(installed):
    return installed[0]


@pytest.fixture(scope="module")
def served(comfyui, comfyui_tree):
    """The server of that ComfyUI, in what it and the pack require."""
    with running(comfyui_tree, base=comfyui, python=lean_python()) as server:
        assert not (comfyui / "custom_nodes" / PACK).is_symlink()
        yield server


@pytest.fixture(scope="module")
def command(comfyui):
    """Runs `python -m custom_nodes.FOLDER.cli …` in ComfyUI's folder → what it says."""

    def run_command(*arguments, folder=PACK):
        return run([lean_python(), "-m", f"custom_nodes.{folder}.cli", *arguments], comfyui)

    return run_command


def test_the_archive_is_small_and_holds_no_tests(archive):
    assert archive.stat().st_size < 15_000_000
    with zipfile.ZipFile(archive) as packed:
        names = set(packed.namelist())
    assert not ABSENT & {name.partition("/")[0] for name in names}
    assert not {name for name in names if "golden" in name or name.startswith("tests")}
    needed = {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "NOTICE", "README.md"}
    assert names >= needed | {f"web/docs/{path.name}" for path in (ROOT / "web/docs").glob("*.md")}


def test_the_node_list_is_whole_and_nothing_failed(served):
    nodes = {name for name in served.object_info() if name.startswith("DeltaConv")}
    assert nodes == {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    said = served.said()
    # ComfyUI's own nodes may fail to load; ours appear in no traceback, and warn of nothing.
    assert not re.search(rf"(?i)file .*custom_nodes.{PACK}", said)
    assert not [line for line in said.splitlines() if "ΔConv" in line]


def test_templates_help_and_languages_are_served(served):
    workflows = sorted((ROOT / "workflows").glob("*.json"))
    assert sorted(served.get("/workflow_templates")[PACK]) == [path.stem for path in workflows]
    for path in workflows:
        for ending in (".json", ".jpg"):
            address = f"/api/workflow_templates/{PACK}/{path.stem}{ending}"
            assert served.fetch(address) == path.with_suffix(ending).read_bytes()
    for path in sorted((ROOT / "web").rglob("*.*")):
        address = f"/extensions/{PACK}/{path.relative_to(ROOT / 'web').as_posix()}"
        assert served.fetch(address) == path.read_bytes()
    languages = served.get("/i18n")
    for folder in (ROOT / "locales").iterdir():
        texts = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        assert texts.items() <= languages[folder.name]["nodeDefs"].items()
    offered = {entry["name"] for entry in served.get("/global_subgraphs").values()}
    assert offered >= {path.stem for path in (ROOT / "subgraphs").glob("*.json")}


def test_the_demo_runs_to_its_end(comfyui, served):
    pack = comfyui / "custom_nodes" / PACK
    workflow = json.loads((pack / "workflows" / "1_demo.json").read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, served.object_info())
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 1
        if node["class_type"] == "EmptyChromaRadianceLatentImage":
            node["inputs"] |= {"width": 16, "height": 16}
    assert served.queue(prompt)["status"]["completed"]
    assert list((comfyui / "output" / "deltaconv").glob("demo_*.png"))


@pytest.mark.any_comfyui
def test_the_self_test_and_the_benchmark_run(command):
    assert command("selftest", "--seconds", "1").endswith("No wrong results.\n")
    assert "6929 ×" in command("bench", "--flops")


@pytest.mark.any_comfyui
def test_distill_finds_the_comfyui_that_it_lies_in(command, comfyui, tmp_path):
    stages = {"layers": {"steps": 2, "batch": 1}, "joint": {"steps": 0}}
    entries = {
        "samples": 2,
        "size": 16,
        "recipe": {"middle_block.1.transformer_blocks.0.attn1": 3},
        "settings": {"init": "random", **stages},
    }
    config = comfyui / "tiny.yaml"
    config.write_text(yaml.safe_dump(entries), encoding="utf-8")
    # A name that no import statement could hold, of a link that leads elsewhere.
    shutil.copytree(comfyui / "custom_nodes" / "deltaconv", tmp_path / "pack")
    (comfyui / "custom_nodes" / "Delta-Conv").symlink_to(tmp_path / "pack")
    said = command("distill", "--config", config.name, folder="Delta-Conv")
    assert "2 samples of its own are drawn" in said and "Weights:" in said
    weights = read_weights(comfyui / "output" / "distill" / "deltaconv.safetensors")
    assert weights.training["steps"] == 2


def test_no_package_came_went_or_changed(installed, served):
    """After all that is above: the server's start, a prompt, the commands."""
    _, before = installed
    assert len(before) > 20 and frozen() == before


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
