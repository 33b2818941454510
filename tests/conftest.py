"""Fixtures that bring the real ComfyUI: its modules in this process, its server, its web page."""

import os
import sys
from pathlib import Path

import pytest
from comfyui_deltaconv.development import ROOT, host
from comfyui_deltaconv.development.comfyui import chosen_tree

# `python -m pytest` puts the current folder first, where our nodes/ would shadow ComfyUI's nodes.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def pytest_collection_modifyitems(items):
    for item in items:
        if "comfyui_tree" in item.fixturenames:
            item.add_marker("comfyui")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of golden tensors."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def comfyui_tree() -> Path:
    """The ComfyUI this process tests on: what dev.py put into DELTACONV_COMFYUI, or the chosen."""
    tree = Path(os.environ.get("DELTACONV_COMFYUI") or chosen_tree())
    assert (tree / "main.py").is_file(), f"no ComfyUI in {tree}; run `python dev.py test` once"
    return tree


@pytest.fixture(scope="session")
def comfy(comfyui_tree, tmp_path_factory):
    """The package `comfy` of the tree, imported into this process and set to compute on the CPU."""
    host.enter(comfyui_tree, tmp_path_factory.mktemp("comfyui"))
    import comfy

    return comfy
