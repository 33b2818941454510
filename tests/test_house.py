"""The shape of the house: which way imports point, and what importing the pack costs."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_deltaconv.development import ROOT, lint

HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server", "execution"}
LAZY = {"triton", "scipy", "matplotlib", "kornia", "huggingface_hub", "bitsandbytes"}
LAZY |= {"accelerate", "datasets", "pyarrow", "webdataset", "tensorboard"}
# Who may know ComfyUI; the directions among these are contracts, which lint checks.
LAYERS = {"kernels": False, "deltaconv": False, "nodes": True, "benchmarks": True, "cli": True}


def sources(layer):
    return sorted((ROOT / layer).rglob("*.py"))


def imports(path):
    """(module, whether at the top of the file) of every import; relative ones as `<layer>.…`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield node.module, top
                continue
            base = package[: len(package) - node.level + 1]
            module = ".".join((*base, *((node.module or "").split(".") if node.module else ())))
            if node.module:
                yield module, top
            else:
                yield from ((f"{module}.{a.name}".strip("."), top) for a in node.names)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="import-linter needs Python 3.11")
def test_style_contracts_and_types_hold(capfd):
    code = lint.main([])
    said = "".join(capfd.readouterr())
    assert code == 0, said[-3000:]
    assert "Contracts: 3 kept, 0 broken." in said


@pytest.mark.parametrize("layer", LAYERS)
def test_the_core_knows_nothing_of_its_host(layer):
    seen = 0
    for path in sources(layer):
        for module, _ in imports(path):
            seen += 1
            head = module.split(".")[0]
            assert head != "comfyui_deltaconv", f"{path.name} imports the alias"
            if not LAYERS[layer]:
                assert head not in HOST, f"{path.name} of {layer} imports {module} of the host"
    assert seen


def test_one_folder_knows_the_hosts_model_classes():
    knowing = {
        path.parent.relative_to(ROOT).as_posix()
        for path in sources("nodes")
        for module, _ in imports(path)
        if module.startswith("comfy.ldm")
    }
    assert knowing == {"nodes/host/sites"}


@pytest.mark.parametrize("layer", [*LAYERS, ""])
def test_heavy_libraries_are_imported_where_they_are_used(layer):
    paths = sources(layer) if layer else [ROOT / "__init__.py"]
    for path in paths:
        for module, top in imports(path):
            if module.split(".")[0] in LAZY and top:
                # A kernel file is itself imported only by the probe.
                assert "triton" in module and path.parent.name in ("fused", "benchmarks"), path


def test_messages_and_code_name_no_absolute_path():
    for layer in ("", *LAYERS, "development", "tests"):
        for path in (ROOT / layer).rglob("*.py") if layer else ROOT.glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "/" + "root/" not in text and "/" + "work/" not in text, path


def run(code, tree, **environment):
    """The JSON that a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
    # Where it is set, every run would compile what it imports.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", code, str(tree)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(tree).parent
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


ENTER = """
import asyncio, json, sys, time, importlib.util
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import comfy.options
sys.argv = ["x", "--cpu"]
comfy.options.enable_args_parsing()
import torch, comfy.sd, comfy.model_patcher, comfy_api.latest, folder_paths
def load():
    # As ComfyUI does: the module's name is the path of its folder.
    name = ROOT.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, Path(ROOT) / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    asyncio.run(extension.on_load())
    return [node.GET_SCHEMA().node_id for node in asyncio.run(extension.get_node_list())]
"""


def test_importing_the_pack_is_quick_and_brings_nothing_heavy(comfyui_tree):
    code = (
        f"ROOT = {str(ROOT)!r}{ENTER}"
        + """
before = set(sys.modules)
# Neither what else the machine does nor a garbage collection of all that ComfyUI has made is the
# pack's cost: only its own time, and its own objects.
import gc
gc.freeze()
start = time.process_time()
nodes = load()
seconds = time.process_time() - start
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"seconds": seconds, "nodes": nodes, "new": new}))
"""
    )
    # The first run may compile, or the machine be busy; each takes ComfyUI's own import.
    for _ in range(3):
        result = run(code, comfyui_tree)
        assert "DeltaConvApply" in result["nodes"]
        assert not LAZY & set(result["new"])
        if result["seconds"] < 0.1:
            break
    assert result["seconds"] < 0.1


@pytest.mark.any_comfyui
def test_the_pack_loads_and_works_without_triton(comfyui_tree):
    code = (
        f"ROOT = {str(ROOT)!r}"
        + """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
        + ENTER
        + """
nodes = load()
block = sys.modules[ROOT.replace(".", "_x_") + ".deltaconv"].DeltaConvBlock(8, 3)
y = block(torch.zeros(1, 5, 6, 8))
print(json.dumps({"nodes": nodes, "shape": list(y.shape), "triton": "triton" in sys.modules}))
"""
    )
    result = run(code, comfyui_tree)
    assert len(result["nodes"]) >= 6
    assert result["shape"] == [1, 5, 6, 8]
    assert not result["triton"]
