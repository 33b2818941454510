"""The lock covers all that set-up installs, and nothing in it depends on who wrote it."""

import re
from importlib.metadata import distributions

import pytest
from comfyui_deltaconv.development import ROOT, DevelopmentError
from comfyui_deltaconv.development.comfyui.tree import NEWEST, chosen_tree, requirements
from comfyui_deltaconv.development.lock import INPUT, LOCK, pins
from comfyui_deltaconv.development.release import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# pip comes with Python; the pack is the folder itself.
NOT_LOCKED = {"pip", "deltaconv"}


@pytest.fixture(scope="module")
def locked():
    """Name → the one version of it that the lock has for this Python and system."""
    fitting = {}
    for pin in map(Requirement, pins(LOCK.read_text(encoding="utf-8"))):
        if pin.marker is None or pin.marker.evaluate():
            assert fitting.setdefault(canonicalize_name(pin.name), pin) is pin, f"two of {pin}"
    return {name: str(pin.specifier).removeprefix("==") for name, pin in fitting.items()}


def test_everything_installed_is_what_the_lock_has(locked):
    if chosen_tree() != NEWEST.tree:
        pytest.skip("the ComfyUI at COMFYUI_PATH may bring other versions")
    installed = {canonicalize_name(one.name): one.version for one in distributions()}
    installed = {name: installed[name] for name in installed.keys() - NOT_LOCKED}
    assert installed == {name: locked.get(name) for name in installed}


def test_everything_required_is_in_the_lock(locked):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    lines = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    lines += [line for extra in extras for line in extra]
    lines += INPUT.read_text(encoding="utf-8").splitlines()
    lines += requirements(NEWEST.tree)
    wanted = [Requirement(line) for line in lines if not line.startswith("#")]
    unmet = [
        str(one)
        for one in wanted
        if not one.specifier.contains(locked.get(canonicalize_name(one.name), "0"))
    ]
    assert unmet == [], "run `python dev.py lock`"


@pytest.mark.parametrize(
    "line",
    [
        "numpy",
        "numpy>=2",
        "--index-url https://example.org/simple",
        "numpy @ https://example.org/numpy-2.0-py3-none-any.whl",
        "-e .",
        "torch==2.*",
    ],
)
def test_what_floats_or_names_an_address_is_refused(line):
    with pytest.raises(DevelopmentError, match=rf"got {re.escape(repr(line))}"):
        pins(f"# a comment\nnumpy==2.0 ; sys_platform == 'linux'\n{line}\n")
