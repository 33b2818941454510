"""Launches: arguments by name, and Triton's own way where its private one is not known."""

import inspect
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed for this system")
from comfyui_deltaconv.kernels.fused import launch
from comfyui_deltaconv.kernels.fused.launch import Launch
from comfyui_deltaconv.kernels.fused.workspace import Tensors, Workspace


class Compiled:
    """As much of Triton's compiled kernel as a launch past its lookup needs."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, run):
        self.run = run


class Kernel:
    """A kernel of two tensors, a number and a constant that notes every public call."""

    arg_names = ("source", "target", "rows", "K")
    __name__ = "kernel"

    def __init__(self, run):
        self.calls, self.compiled = [], Compiled(run)

    def __getitem__(self, grid):
        def call(*arguments, **options):
            self.calls.append((grid, arguments, options))
            return self.compiled

        return call


def unknown(grid, stream, *arguments):
    """A launcher of a version that nobody has seen."""


class Fields(NamedTuple):
    """The tensors around the kernel, in another order, one of which it does not take."""

    target: object
    other: object
    source: object


def made(kernel, numbers=None, constants=None):
    return Launch(kernel, 7, Fields, numbers or {"rows": 5}, constants or {"K": 3}, warps=8)


def test_arguments_arrive_in_the_kernels_order():
    kernel = Kernel(unknown)
    source, target = torch.zeros(1), torch.ones(1)
    made(kernel)(Fields(target, None, source))
    ((grid, arguments, options),) = kernel.calls
    assert grid == (7, 1, 1)
    assert arguments[0] is source and arguments[1] is target and arguments[2:] == (5, 3)
    assert options == {"num_warps": 8, "num_stages": 1}


@pytest.mark.parametrize(
    ("numbers", "constants"),
    [
        ({"rows": 5, "columns": 4}, {"K": 3}),
        ({"row": 5}, {"K": 3}),
        ({"rows": 5, "target": 1}, {"K": 3}),
        ({"rows": 5}, {"K": 3, "FLIP": 1}),
    ],
)
def test_names_that_the_kernel_lacks_are_refused(numbers, constants):
    with pytest.raises(TypeError, match=r"Expected the arguments .*'source', 'target', 'rows'"):
        made(Kernel(unknown), numbers, constants)


def test_the_workspace_is_the_end_of_the_tensors():
    assert Tensors._fields[-len(Workspace._fields) :] == Workspace._fields


def test_an_unknown_launcher_leaves_the_public_call():
    kernel = Kernel(unknown)
    run = made(kernel)
    for _ in range(3):
        run(Fields(torch.zeros(1), None, torch.zeros(1)))
    assert len(kernel.calls) == 3
    # Addresses are for the private way alone.
    assert not run.ready


def test_a_known_launcher_is_called_past_the_lookup(monkeypatch):
    from triton.runtime import driver

    class Active:
        @staticmethod
        def get_current_stream(index):
            return 11 + index

    monkeypatch.setattr(driver, "_active", Active(), raising=False)
    monkeypatch.setattr(type(driver), "active", property(lambda self: Active()))
    given = []

    def run(gridX, gridY, gridZ, stream, function, *arguments):
        given.append((gridX, gridY, gridZ, stream, function, arguments))

    kernel = Kernel(run)
    again = made(kernel)
    again(Fields(torch.zeros(1), None, torch.zeros(1)))
    assert again.ready and not given
    again(Fields(2048, 0, 1024))
    assert len(kernel.calls) == 1
    assert given == [(7, 1, 1, 11, "function", ("metadata", None, None, None, 1024, 2048, 5, 3))]


@pytest.mark.parametrize(("backend", "name"), [("nvidia", "CudaLauncher"), ("amd", "HIPLauncher")])
def test_the_installed_triton_is_known(backend, name):
    """Where this fails, a new Triton changed its launcher: it runs, with slower launches."""
    module = pytest.importorskip(f"triton.backends.{backend}.driver")
    kind = getattr(module, name)
    # The instance needs a device to be made; how it is called does not.
    assert launch.is_known_launcher(object.__new__(kind))
    from triton.compiler import CompiledKernel

    source = inspect.getsource(CompiledKernel)
    for attribute in ("packed_metadata", "function", "def run"):
        assert attribute in source
