"""The ops out of torch's operators, the choice between implementations, and what torch sees."""

import logging
import re

import pytest
import torch
from comfyui_deltaconv import kernels
from comfyui_deltaconv.deltaconv import DeltaConvBlock
from comfyui_deltaconv.kernels import accuracy, backend, custom_ops, eager
from comfyui_deltaconv.kernels.accuracy import Case
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 5),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    dim=st.sampled_from([4, 12, 32, 64]),
    kernel_size=st.sampled_from([1, 3, 7, 11, 17]),
    scales=st.sampled_from([(1.0,), (1.0, 0.5), (1.0, 0.5, 1 / 3), (0.5,), (0.5, 1.0, 0.25, 0.9)]),
    gate=st.sampled_from(["scaled", "sigmoid"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    biased=st.sets(st.integers(0, 3)),
)
def test_torch_forms_meet_the_definition(dtype, biased, **shape):
    levels = range(len(shape["scales"]))
    case = Case(**shape, biased=tuple(level for level in levels if level in biased))
    for name, ours, own in accuracy.forward_errors(case, dtype, "cpu"):
        assert ours.within(own, dtype), f"{name}: {ours}, torch's own {own}"


@pytest.mark.parametrize(
    "scales, gate, biased",
    [
        ((1.0, 0.5, 1 / 3), "sigmoid", ()),
        ((1.0, 0.5, 1 / 3), "scaled", (0, 2)),
        ((1.0,), "scaled", ()),
        ((0.3,), "sigmoid", (0,)),
    ],
    ids=str,
)
def test_gradients_of_the_operators(scales, gate, biased):
    case = Case(1, 4, 3, 8, 3, scales, gate, biased)
    x, u, *rest = (t.requires_grad_() for t in accuracy.make_inputs(case, torch.float64, "cpu"))
    rest_of_call = (list(scales), gate, sum(1 << level for level in biased))

    def pyramid(*tensors):
        return custom_ops.gated_pyramid(list(tensors), *rest_of_call)

    def projection(*tensors):
        return custom_ops.pyramid_projection(list(tensors), *rest_of_call)

    assert torch.autograd.gradcheck(pyramid, (u, *rest[4:]))
    assert torch.autograd.gradcheck(projection, (x, u, *rest))


@pytest.mark.parametrize("biased", [(), (1,)], ids=["plain", "biased"])
def test_torch_accepts_the_operators(biased):
    case = Case(2, 5, 4, 8, 3, biased=biased)
    x, u, *rest = (t.requires_grad_() for t in accuracy.make_inputs(case, torch.float32, "cpu"))
    call = (list(case.scales), case.gate, 2 * len(biased))
    torch.library.opcheck(torch.ops.deltaconv.gated_pyramid.default, ([u, *rest[4:]], *call))
    torch.library.opcheck(torch.ops.deltaconv.pyramid_projection.default, ([x, u, *rest], *call))


def test_compiling_sees_one_operator_and_no_break():
    block = DeltaConvBlock(16, 3)
    x = torch.randn(2, 7, 5, 16)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, backend=keep, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))
    (graph,) = graphs
    ops = [node for node in graph.graph.nodes if "deltaconv" in str(node.target)]
    assert [str(node.target) for node in ops] == ["deltaconv.pyramid_projection.default"]


@pytest.mark.parametrize("biased", [(), (1,), (0, 1)])
def test_a_compiled_block_trains(biased):
    block = DeltaConvBlock(16, 3, gate="sigmoid", biased=biased)
    x = torch.randn(2, 7, 5, 16)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (block, compiled):
        function(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
        block.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def lent_nothing(linears, like):
    from contextlib import nullcontext

    return nullcontext(None)


class Called:
    """Operations whose Linears lend nothing, as a host's that must be called."""

    Linear = torch.nn.Linear
    lend = staticmethod(lent_nothing)


@pytest.mark.parametrize("gate", kernels.GATES)
def test_a_block_whose_linears_must_be_called_is_the_same_block(gate):
    block = DeltaConvBlock(16, 3, gate=gate)
    called = DeltaConvBlock(16, 3, gate=gate, operations=Called)
    called.load_state_dict(block.state_dict())
    x = torch.randn(2, 6, 5, 16)
    torch.testing.assert_close(called(x), block(x))


def test_a_hooked_linear_is_called():
    block = DeltaConvBlock(8, 3)
    seen = []
    block.conv_out.register_forward_hook(lambda *_: seen.append(1))
    block(torch.randn(1, 4, 4, 8))
    assert seen


def request(**changes):
    fields = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "height": 8,
        "width": 8,
        "channels": 8,
        "kernel_size": 3,
        "scales": (1.0, 0.5),
    }
    return backend.Request(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, "on the CPU"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"kernel_size": 19}, "at most 17 wide, got kernel_size=19"),
        ({"scales": (0.5,)}, r"got scales=(0.5,)"),
        ({"scales": (1.0, 0.5, 0.4, 0.3)}, "up to two smaller ones"),
        ({"height": 40000}, "got height=40000"),
    ],
)
def test_reasons_name_what_is_in_the_way(changes, reason):
    pytest.importorskip("triton", reason="without Triton its absence is the only reason")
    reasons = backend.reasons_against_triton(request(**changes))
    assert any(reason in sentence for sentence in reasons)
    if changes:
        # All reasons at once, not one per attempt.
        assert len(reasons) == 2


def test_the_reason_is_logged_once(caplog):
    inputs = accuracy.make_inputs(Case(1, 4, 4, 8, 3), torch.float32, "cpu")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            kernels.gated_pyramid(inputs[1], inputs[6:], (1.0, 0.5), "scaled")
        kernels.gated_pyramid(inputs[1][:, :3], inputs[6:], (1.0, 0.5), "scaled")
    said = [record.getMessage() for record in caplog.records if "ΔConv" in record.getMessage()]
    assert len(said) == 1 and "torch operators run, not Triton" in said[0]


def test_forced_and_impossible_is_an_error(monkeypatch):
    inputs = accuracy.make_inputs(Case(1, 4, 4, 8, 3), torch.float64, "cpu")
    monkeypatch.setenv("DELTACONV_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=r"DELTACONV_KERNELS=triton, but .*Unset it"):
        kernels.gated_pyramid(inputs[1], inputs[6:], (1.0, 0.5), "scaled")
    monkeypatch.setenv("DELTACONV_KERNELS", "cuda")
    with pytest.raises(ValueError, match="to be torch or triton, got 'cuda'"):
        kernels.gated_pyramid(inputs[1], inputs[6:], (1.0, 0.5), "scaled")
    monkeypatch.setenv("DELTACONV_KERNELS", "torch")
    assert kernels.gated_pyramid(inputs[1], inputs[6:], (1.0, 0.5), "scaled").isfinite().all()


def test_everything_that_does_not_fit_is_said_before_anything_runs():
    u, weight = torch.randn(1, 4, 4, 8), torch.randn(3, 3, 8)
    wrong = [torch.randn(3, 3, 6), weight.half()]
    with pytest.raises(ValueError) as error:
        kernels.gated_pyramid(u, [weight, *wrong], (1.0, 0.5), "soft")
    message = str(error.value)
    for part in ("gate='soft'", "got 3 for scales", r"got [3, 3, 6]", "cast it first"):
        assert part in message


MISFITS = {
    "x": ((2, 5, 4, 16), "x must be [2, 4, 4, 16], got [2, 5, 4, 16]"),
    "tokens": ((2, 16, 16), "x must be [2, 4, 4, 16], got [2, 16, 16]"),
    "out_weight": ((16, 4), "out_weight must be [16, 8], got [16, 4]"),
    "out_bias": ((8,), "out_bias must be [16], got [8]"),
    "pool_weight": ((8, 8), "pool_weight must be [16, 16], got [8, 8]"),
    # torch would stretch it, and a kernel read on behind it.
    "pool_bias": ((1,), "pool_bias must be [16], got [1]"),
}


@pytest.mark.parametrize("gradient", [False, True], ids=["drawing", "training"])
@pytest.mark.parametrize("name", MISFITS)
def test_a_projection_that_does_not_fit_is_refused(name, gradient):
    case = Case(2, 4, 4, 16, 3)
    inputs = accuracy.make_inputs(case, torch.float32, "cpu")
    shape, message = MISFITS[name]
    inputs[accuracy.NAMES.index("x" if name == "tokens" else name)] = torch.randn(shape)
    inputs[1].requires_grad_(gradient)
    with pytest.raises(ValueError, match=re.escape(message)):
        accuracy.project(case, inputs)


def test_every_tensor_is_on_the_device_of_u():
    case = Case(1, 4, 4, 8, 3)
    for index, name in enumerate(accuracy.NAMES):
        inputs = accuracy.make_inputs(case, torch.float32, "cpu")
        inputs[index] = inputs[index].to("meta")
        message = f"expected {name} on cpu, got meta; move it first"
        with pytest.raises(ValueError, match="a kernel in .* on meta" if name == "u" else message):
            accuracy.project(case, inputs)


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        ([None], "expected one bias or None per scale, got 1"),
        ([torch.randn(6), None], "biases must be [8], got [6]"),
        (
            [None, torch.randn(8).half()],
            "expected a bias in torch.float32 on cpu, got torch.float16",
        ),
        ([torch.randn(8, device="meta"), None], "got torch.float32 on meta"),
    ],
)
def test_biases_that_do_not_fit_are_refused(biases, message):
    u, weights = torch.randn(1, 4, 4, 8), [torch.randn(3, 3, 8)] * 2
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.gated_pyramid(u, weights, (1.0, 0.5), "scaled", biases)


def test_a_kernel_without_a_middle_is_refused():
    with pytest.raises(ValueError, match=r"kernels must be \[4, 4, 8\] with an odd k"):
        kernels.gated_pyramid(torch.randn(1, 6, 6, 8), [torch.randn(4, 4, 8)], (1.0,), "scaled")


def test_half_precision_runs_in_single_on_a_cpu():
    # Without this a CPU needs a hundred times as long for the same map.
    x, weight = torch.randn(1, 6, 4, 5).half(), torch.randn(3, 3, 6).half()
    exact = eager.depthwise(x.double(), weight.double())
    assert torch.equal(eager.depthwise(x, weight), exact.half())
