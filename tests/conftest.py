"""Fixtures that bring the real ComfyUI: its modules in this process, its server, its web page."""

import gc
import os
import sys
from pathlib import Path

import pytest
from comfyui_deltaconv.cli import host
from comfyui_deltaconv.development import ROOT, unwind_when_terminated
from comfyui_deltaconv.development.comfyui.server import running
from comfyui_deltaconv.development.comfyui.tree import chosen_tree
from comfyui_deltaconv.development.lean import lean_python

# A gate that is stopped leaves no server behind.
unwind_when_terminated()

# `python -m pytest` puts the current folder first, where our nodes/ would shadow ComfyUI's nodes.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def pytest_collection_modifyitems(items):
    for item in items:
        if "comfyui_tree" in item.fixturenames and not item.get_closest_marker("any_comfyui"):
            item.add_marker("comfyui")
    # Side by side, so that each renderer's page is loaded once: it takes longer than most tests.
    items.sort(key=_page_order)


def _page_order(item):
    return 2 if "browser" not in item.fixturenames else "Vue nodes" in item.name


def pytest_runtest_teardown(item, nextitem):
    """Leave the page after its last test: it never stops drawing, and takes a share of a core."""
    used = [each for each in (item, nextitem) if each and "browser" in each.fixturenames]
    if used == [item] and "browser" in item.funcargs:
        item.funcargs["browser"].get("about:blank")


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
    import comfy.sd

    # Collections between tests need not look at what all imports made: that takes 0.3 s each time.
    gc.collect()
    gc.freeze()
    return comfy


@pytest.fixture
def one_thread():
    """Torch on one thread: its own rounding depends on how many share a sum."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def as_comfyui_runs_nodes(comfy):
    """Inference mode, and afterwards no model left loaded."""
    import comfy.model_management
    import torch

    with torch.inference_mode():
        yield
    # Dead models first: 0.18 counts its list of loaded models wrong where one dies meanwhile.
    gc.collect()
    comfy.model_management.unload_all_models()


@pytest.fixture
def demo_model(as_comfyui_runs_nodes):
    """The packaged demo's MODEL."""
    from comfyui_deltaconv.nodes.host.demo_model import load_demo_model

    return load_demo_model()


@pytest.fixture
def demo_weights():
    """The packaged demo's ΔConv weights."""
    from comfyui_deltaconv.deltaconv import demo, read_weights

    return read_weights(demo.DELTACONV_PATH)


@pytest.fixture
def pixart(as_comfyui_runs_nodes):
    """A small real PixArt with random weights."""
    from host_models import SMALL_PIXART, host_model, randomize

    return randomize(host_model("PixArtSigma", SMALL_PIXART), 0.1)


@pytest.fixture(scope="session")
def server(comfyui_tree):
    """A real ComfyUI server with the pack loaded, on the CPU, as a user's environment is.

    It finds what ComfyUI and the pack require, and nothing that only the tests bring.
    """
    with running(comfyui_tree, python=lean_python()) as server:
        yield server


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; without one, tests skip on a person's machine and fail in CI."""
    # Imported here: tests of the kernels run on machines without Selenium.
    from comfyui_deltaconv.development.comfyui.browser import chromium, missing_programs

    missing = missing_programs()
    if missing and not os.environ.get("CI"):
        pytest.skip(f"no {' and no '.join(missing)} on the path for the page tests")
    assert not missing, f"CI needs {missing} for the page tests"
    with chromium() as driver:
        yield driver
