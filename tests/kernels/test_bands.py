"""The convolution on tensor cores against the float64 definition: on a GPU, or interpreted."""

import copy
import os
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from comfyui_deltaconv import kernels
from comfyui_deltaconv.kernels import accuracy, backend
from comfyui_deltaconv.kernels.accuracy import Case
from hypothesis import given, settings
from hypothesis import strategies as st

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# The interpreter truncates bf16 where hardware rounds.
DTYPES = [torch.float16] + [torch.bfloat16] * HAS_GPU

if not HAS_GPU:
    # What is decorated while this is set is interpreted; no other test, and no server, inherits it.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed for this system")
from comfyui_deltaconv.kernels.fused import forward, plan, plan_bands  # noqa: E402
from comfyui_deltaconv.kernels.fused.workspace import Tensors  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)

# Torch's own rounding is the yardstick.
pytestmark = pytest.mark.usefixtures("one_thread")
banded = partial(kernels.pyramid_projection, convolution="bands")


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Triton or an error, and memory of torch.empty full of NaN: what is left out shows."""
    monkeypatch.setenv("DELTACONV_KERNELS", "triton")
    if not HAS_GPU:
        from triton.runtime.interpreter import interpreter_builder

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        # Half of the interpreter's time goes into watching small integers not overflow.
        quick = replace(interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter_builder, "options", quick)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def errors(case, dtype):
    """(name, our error, torch's own) of the gated pyramid behind the launches, and of the block."""
    inputs = accuracy.make_inputs(case, dtype, DEVICE)
    weights, biases = accuracy.kernels_of(case, inputs)
    shape = forward.shape_of(inputs[1], weights, case.scales, case.gate, biases, "bands")
    planned = plan.plan_forward(shape, case.dim, dtype)
    memory, buffers = planned.memory(inputs[0].device)
    # Tensors, also where launches would take addresses.
    buffers = type(buffers)._make([buffer.of(memory) for buffer in planned.buffers.values()])
    result = torch.empty_like(inputs[0])
    tensors = (inputs[1], inputs[0], *forward.three(weights), *forward.three_biases(biases))
    for launch in planned.launches:
        launch(Tensors(*tensors, *inputs[2:6], result, *buffers))
    tokens = case.height * case.width
    pyramid = buffers.pyramid[..., :tokens].unflatten(-1, (case.height, case.width))
    found = {"pyramid": pyramid.movedim(1, -1), "block": result}
    with torch.no_grad():
        exact = accuracy.exactly(inputs)
        for name, run, definition in (
            ("pyramid", accuracy.pyramid, kernels.gated_pyramid_definition),
            ("block", accuracy.project, kernels.pyramid_projection_definition),
        ):
            right = run(case, exact, definition)
            own = accuracy.distance(run(case, inputs, definition), right)
            yield name, accuracy.distance(found[name], right), own


def assert_within_budget(case, dtype):
    for name, ours, own in errors(case, dtype):
        assert ours.within(own, dtype), f"{name}: {ours}, torch's own {own}"


@pytest.fixture
def patches(request, monkeypatch):
    """As many patches to a program: with few of them, small maps have the tiles of large ones."""
    # Tensor cores take 16 at least.
    if not HAS_GPU:
        monkeypatch.setattr(plan_bands, "TILE", plan_bands.TILE._replace(patches=request.param))
    plan.plan_forward.cache_clear()
    yield
    plan.plan_forward.cache_clear()


# With patches of a program, rows and columns of a patch.
CASES = {
    "eight rows": (Case(1, 19, 34, 4, 11, gate="sigmoid"), (4, 8, 16)),
    "eight rows, a small kernel": (Case(1, 17, 21, 8, 9), (4, 8, 8)),
    "four rows": (Case(1, 10, 18, 8, 7, biased=(0, 1)), (8, 4, 8)),
    "ragged, two images": (Case(2, 7, 13, 12, 5), (32, 2, 8)),
    "three scales": (Case(1, 9, 7, 8, 3, (1.0, 0.5, 1 / 3), "sigmoid", (0, 2)), (1, 8, 8)),
    "exact thirds": (Case(1, 6, 12, 8, 3, (1.0, 0.5, 1 / 3), biased=(1,)), (4, 2, 8)),
    "kernel 17, larger than the map": (Case(1, 2, 5, 8, 17), (32, 2, 16)),
    "kernel 13": (Case(1, 8, 20, 8, 13, gate="sigmoid"), (4, 4, 16)),
    "one position": (Case(1, 1, 1, 8, 3), (32, 2, 8)),
    "one scale, kernel 1": (Case(1, 5, 6, 20, 1, (1.0,)), (2, 2, 8)),
    "wider than a program": (Case(1, 2, 37, 4, 3), (2, 2, 8)),
    "channels of several programs": (Case(1, 2, 3, 72, 3), (2, 2, 8)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "patches", "tile"),
    [pytest.param(case, few, tile, id=name) for name, (case, (few, *tile)) in CASES.items()],
    indirect=["patches"],
)
def test_forward(case, patches, tile, dtype):
    rows, step = tile
    across = -(-case.width // step)
    assert plan_bands.step_of(case.kernel_size) == step
    if not HAS_GPU:
        assert plan_bands.band_tile((case.height, case.width), across).rows == rows
    assert_within_budget(case, dtype)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(1, 64, 50, 8, 11), marks=pytest.mark.long, id="eight rows"),
        pytest.param(Case(1, 33, 62, 8, 9), marks=pytest.mark.long, id="narrow patches"),
        pytest.param(Case(1, 2, 261, 4, 3), marks=pytest.mark.long, id="wider than a program"),
    ],
)
def test_forward_with_the_tiles_of_a_gpu(case):
    assert_within_budget(case, torch.float16)


ANY = {
    "batch": st.integers(1, 2),
    "height": st.integers(1, 9),
    "width": st.integers(1, 20),
    "dim": st.sampled_from([4, 8]),
    "kernel_size": st.sampled_from(range(1, 18, 2)),
    "scales": st.sampled_from([(1.0,), (1.0, 0.5), (1.0, 0.5, 1 / 3), (1.0, 0.9)]),
    "gate": st.sampled_from(["scaled", "sigmoid"]),
    "biased": st.sets(st.integers(0, 2)),
}


def at_any_shape(biased, **shape):
    levels = range(len(shape["scales"]))
    case = Case(**shape, biased=tuple(level for level in levels if level in biased))
    assert_within_budget(case, torch.float16)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(**ANY)
def test_forward_at_any_shape(**shape):
    at_any_shape(**shape)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(**ANY)
def test_forward_at_many_shapes(**shape):
    at_any_shape(**shape)


def test_gradients_are_those_of_the_default():
    case = Case(1, 3, 5, 8, 3, biased=(1,))
    inputs = [t.requires_grad_() for t in accuracy.make_inputs(case, torch.float16, DEVICE)]
    results = [accuracy.project(case, inputs, op) for op in (banded, kernels.pyramid_projection)]
    upstream = torch.randn_like(results[0])
    ours, default = (torch.autograd.grad(each, inputs, upstream) for each in results)
    assert all(map(torch.equal, ours, default))
    assert torch.allclose(*results, atol=1e-2)


def convolutions(monkeypatch, call):
    """The names of the kernels that convolve in `call`."""
    ran = []
    launch = plan.Launch.__call__

    def noted(self, tensors):
        if self.kernel.__name__ in ("gated_kernel", "bands_kernel"):
            ran.append(self.kernel.__name__)
        return launch(self, tensors)

    monkeypatch.setattr(plan.Launch, "__call__", noted)
    with torch.no_grad():
        call()
    return ran


def test_the_environment_chooses_and_an_argument_overrides_it(monkeypatch):
    case = Case(1, 2, 2, 4, 3)
    inputs = accuracy.make_inputs(case, torch.float16, DEVICE)
    site = partial(accuracy.project, case, inputs, kernels.SiteProjection())
    monkeypatch.setenv("DELTACONV_CONVOLUTION", "bands")
    assert convolutions(monkeypatch, site) == ["bands_kernel"]
    rows = partial(kernels.pyramid_projection, convolution="rows")
    assert convolutions(monkeypatch, lambda: accuracy.project(case, inputs, rows))[0] == (
        "gated_kernel"
    )
    monkeypatch.delenv("DELTACONV_CONVOLUTION")
    assert backend.convolution() == "rows"
    with pytest.raises(ValueError, match=r"convolution to be one of .*rows.*bands.*got 'bnads'"):
        accuracy.project(case, inputs, partial(kernels.pyramid_projection, convolution="bnads"))


def test_what_bands_do_not_take_keeps_its_rows(monkeypatch):
    case = Case(1, 2, 2, 8, 3)
    inputs = accuracy.make_inputs(case, torch.float32, DEVICE)
    call = partial(accuracy.project, case, inputs, banded)
    assert convolutions(monkeypatch, call) == ["gated_kernel"]


def test_copies_of_a_site_keep_its_convolution():
    site = kernels.SiteProjection("bands")
    for copied in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert copied._convolution == "bands"
