"""The Triton kernels against the float64 definition: on a GPU, or in Triton's interpreter."""

import json
import os
from dataclasses import replace

import pytest
import torch
from comfyui_deltaconv import kernels
from comfyui_deltaconv.benchmarks import shapes
from comfyui_deltaconv.deltaconv import DeltaConvBlock
from comfyui_deltaconv.kernels import accuracy, compile_ahead, selftest
from comfyui_deltaconv.kernels.accuracy import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

HAS_GPU = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
DEVICE = "cpu" if not HAS_GPU else "cuda" if torch.cuda.is_available() else "xpu"
# The interpreter truncates bf16 where hardware rounds.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * HAS_GPU

if not HAS_GPU:
    # What is decorated while this is set is interpreted; no other test, and no server, inherits it.
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="Triton is not installed for this system")
from comfyui_deltaconv.kernels.fused import backward, forward, plan  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)


# Torch's own rounding is the yardstick.
pytestmark = pytest.mark.usefixtures("one_thread")

TILES = (*(tile for _, tile in plan.PROJECTION_TILES), plan.NARROW_TILE)


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Triton or an error: no test here may pass on torch's operators."""
    monkeypatch.setenv("DELTACONV_KERNELS", "triton")
    if not HAS_GPU:
        from triton.runtime.interpreter import interpreter_builder

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        # Half of the interpreter's time goes into watching small integers not overflow.
        quick = replace(interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter_builder, "options", quick)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that torch.empty hands out is full of NaN: what a kernel leaves out shows."""
    # As a warning only: the definition's own pooling has no deterministic gradient on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_within_budget(errors, dtype):
    for name, ours, own in errors:
        assert ours.within(own, dtype), f"{name}: {ours}, torch's own {own}"


FORWARD = {
    "one position": Case(1, 1, 1, 16, 3),
    "one position, large kernel": Case(2, 1, 1, 8, 7, gate="sigmoid"),
    "ragged": Case(2, 7, 13, 32, 5),
    "batch 5": Case(5, 3, 5, 8, 3, gate="sigmoid"),
    "kernel larger than the map": Case(1, 4, 3, 16, 11),
    "kernel 17": Case(1, 2, 5, 8, 17),
    "kernel 1": Case(1, 5, 4, 8, 1),
    "one row": Case(1, 1, 70, 16, 3),
    "one column": Case(1, 21, 1, 16, 3),
    "three scales": Case(1, 9, 7, 16, 3, (1.0, 0.5, 1 / 3)),
    "three scales, sigmoid": Case(2, 6, 11, 16, 3, (1.0, 0.5, 1 / 3), "sigmoid"),
    "one scale": Case(2, 6, 5, 16, 3, (1.0,)),
    "uneven scales": Case(1, 7, 9, 8, 3, (1.0, 0.7, 0.3)),
    "channels that fill no block": Case(1, 5, 6, 20, 3),
    "fewest channels": Case(1, 6, 5, 4, 3),
    "several channel blocks": Case(1, 3, 4, 192, 3),
    "biases": Case(2, 7, 5, 20, 3, biased=(0, 1)),
    "a bias below": Case(1, 7, 13, 16, 3, gate="sigmoid", biased=(1,)),
    "one scale with a bias": Case(1, 5, 6, 16, 3, (1.0,), biased=(0,)),
    "three scales, two biases": Case(1, 9, 7, 16, 3, (1.0, 0.5, 1 / 3), biased=(0, 2)),
}


# In the interpreter both dtypes take the same path but for loads, stores and the projection.
BOTH = {"ragged", "three scales", "one scale", "channels that fill no block", "one position"}
BOTH |= {"a bias below"}


@pytest.mark.parametrize(
    "name, dtype",
    [(n, d) for n in FORWARD for d in DTYPES if HAS_GPU or d is torch.float32 or n in BOTH],
    ids=str,
)
def test_forward(name, dtype):
    case = FORWARD[name]
    assert_within_budget(accuracy.forward_errors(case, dtype, DEVICE), dtype)


# The interpreter takes a minute for the larger golden cases; a GPU meets them all.
GOLDEN = ["sd_odd", "small_kernel_bigger_than_map", "bias_small_map"]
GOLDEN += ["sd_square", "sd_wide", "three_scales", "pixart"] * HAS_GPU
GOLDEN += ["bias_scaled", "bias_sigmoid_odd", "bias_three", "bias_no_up_bias"] * HAS_GPU


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_block(data, case):
    name = "block_bias" if case.startswith("bias") else "block"
    with safe_open(data / f"{name}.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()[case])
        names = [name for name in file.keys() if name.startswith(f"{case}.w.")]
        state = {name.split(".w.")[1]: file.get_tensor(name) for name in names}
        x, y = file.get_tensor(f"{case}.x"), file.get_tensor(f"{case}.y")
    block = DeltaConvBlock.from_state(state, gate=meta["gate"], scales=meta["scales"])
    with torch.no_grad():
        result = block.to(DEVICE)(x.to(DEVICE)).cpu()
    assert (result - y).abs().max() / y.abs().max() < 1e-5


BACKWARD = {
    "ragged": (Case(2, 7, 9, 16, 5), torch.float32),
    "sigmoid, kernel larger than the map": (Case(1, 4, 3, 8, 7, gate="sigmoid"), torch.float32),
    "three scales": (Case(1, 7, 6, 8, 3, (1.0, 0.5, 1 / 3)), torch.float16),
    "one scale": (Case(2, 5, 4, 8, 3, (1.0,), "sigmoid"), torch.float16),
    "one position": (Case(1, 1, 1, 8, 3), torch.float32),
    "long and narrow": (Case(1, 17, 2, 8, 3), torch.float32),
    # Channels enough that torch's own error in a bias's gradient is not small by luck.
    "biases": (Case(2, 5, 7, 64, 3, biased=(0, 1)), torch.float32),
    "two of three biases": (
        Case(1, 7, 6, 32, 3, (1.0, 0.5, 1 / 3), "sigmoid", (0, 2)),
        torch.float16,
    ),
}


@pytest.mark.parametrize("case, dtype", BACKWARD.values(), ids=BACKWARD)
def test_gradients(case, dtype):
    assert_within_budget(accuracy.gradient_errors(case, dtype, DEVICE), dtype)


@pytest.fixture
def large_map(monkeypatch):
    """Plans of small maps are those of large ones on a large GPU: its tiles, its shared memory."""
    monkeypatch.setattr(plan, "FEW_PROGRAMS", 0)
    if not HAS_GPU:
        monkeypatch.setattr(plan, "shared_memory", lambda device: compile_ahead.SHARED["sm_90"])
    for cached in (plan.plan_forward, backward.plan_level):
        cached.cache_clear()
    yield
    for cached in (plan.plan_forward, backward.plan_level):
        cached.cache_clear()


# With the tile of the convolutions and the spans of the pooling.
REAL = {
    "16 channels": (Case(1, 8, 34, 64, 5, gate="sigmoid"), (8, 32, 16), (2, 0)),
    "32 channels": (Case(1, 10, 18, 128, 3), (8, 16, 32), (2, 0)),
    "three scales": (Case(1, 12, 18, 128, 3, (1.0, 0.5, 1 / 3)), (8, 16, 32), (2, 3)),
}


@pytest.mark.parametrize("name", REAL)
def test_forward_as_real_models_have_it(large_map, name):
    case, tile, spans = REAL[name]
    pool, convolve, *_ = compile_ahead.launches(case, torch.float16, False)
    assert tuple(convolve.constants[key] for key in ("ROWS", "COLUMNS", "CHANNELS")) == tile
    assert (pool.constants["SPAN1"], pool.constants["SPAN2"]) == spans
    assert_within_budget(accuracy.forward_errors(case, torch.float16, DEVICE), torch.float16)


def test_gradients_as_real_models_have_them(large_map):
    case = REAL["32 channels"][0]
    assert_within_budget(accuracy.gradient_errors(case, torch.float16, DEVICE), torch.float16)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 36),
    dim=st.sampled_from([4, 8, 12, 24]),
    kernel_size=st.sampled_from([1, 3, 5]),
    scales=st.sampled_from([(1.0,), (1.0, 0.5), (1.0, 0.5, 1 / 3), (1.0, 0.9)]),
    gate=st.sampled_from(["scaled", "sigmoid"]),
    biased=st.sets(st.integers(0, 2)),
)
def test_forward_at_any_shape(biased, **shape):
    levels = range(len(shape["scales"]))
    case = Case(**shape, biased=tuple(level for level in levels if level in biased))
    errors = accuracy.forward_errors(case, torch.float32, DEVICE)
    assert_within_budget(errors, torch.float32)


def test_gradients_are_the_same_bits_every_time():
    case = Case(1, 9, 3, 8, 1)

    def gradients():
        inputs = [t.requires_grad_() for t in accuracy.make_inputs(case, torch.float32, DEVICE)]
        return torch.autograd.grad(accuracy.project(case, inputs).sum(), inputs)

    assert all(map(torch.equal, gradients(), gradients()))


def test_inputs_need_not_be_contiguous_or_aligned():
    case = Case(2, 5, 6, 8, 3)
    inputs = accuracy.make_inputs(case, torch.float32, DEVICE)
    expected = accuracy.project(case, inputs)
    turned = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in inputs]
    assert not turned[0].is_contiguous()
    assert torch.equal(accuracy.project(case, turned), expected)
    shifted = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in inputs]
    assert shifted[0].data_ptr() % 16
    assert torch.equal(accuracy.project(case, shifted), expected)


# No device multiplies fp32 with it: only the interpreter has the memory for these tiles.
@pytest.mark.parametrize("dtype", DTYPES[HAS_GPU:], ids=str)
@pytest.mark.parametrize("inner, dim", [(64, 80), (128, 256), (20, 24)])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.tokens} by {tile.outputs}")
def test_projection_adds_the_context_of_its_own_image(tile, inner, dim, dtype):
    if HAS_GPU and tile.shared > plan.shared_memory(torch.device(DEVICE)):
        pytest.skip("this device has too little shared memory for the tile, and takes another")
    batch, tokens = 2, 150
    normal = torch.Generator().manual_seed(0)
    pyramid = torch.randn(batch, tokens, inner, generator=normal).to(dtype).to(DEVICE)
    weight = torch.randn(dim, inner, generator=normal).to(dtype).to(DEVICE)
    context = torch.randn(batch, dim, generator=normal).to(DEVICE)
    out = torch.empty(batch, tokens, dim, dtype=dtype, device=DEVICE)
    launch = plan.plan_projection(batch, tokens, inner, dim, tile)
    assert launch.constants["EVEN"] == (inner % tile.inner == 0)
    tensors = plan.Tensors(*[None] * len(plan.Tensors._fields))
    launch(tensors._replace(pyramid=pyramid, out_weight=weight, context=context, result=out))
    exact = pyramid.double() @ weight.double().t() + context.double()[:, None]
    own = (pyramid @ weight.t() + context[:, None].to(dtype)).to(dtype)
    assert accuracy.distance(out, exact.cpu()).within(accuracy.distance(own, exact.cpu()), dtype)


@pytest.mark.parametrize("dim", [16, None], ids=["projection", "pyramid"])
def test_ready_launches_get_the_addresses_of_the_same_memory(monkeypatch, dim):
    shape = plan.Shape(2, 5, 4, 8, 3, (1.0, 0.5), "scaled", torch.float16, torch.device("cpu"))
    planned = plan.plan_forward(shape, dim, torch.float16)
    monkeypatch.setattr(plan.Launch, "ready", True)
    memory, addresses = planned.memory(shape.device)
    for name, buffer in planned.buffers.items():
        tensor = buffer.of(memory)
        # Without a projection there is no pyramid, and an empty tensor has no address.
        assert getattr(addresses, name) == tensor.data_ptr() or not tensor.numel()
    assert planned.size == memory.numel() and len(planned.buffers) == len(addresses)


def variants(case, device_memory):
    """What Triton compiles anew for, kernel, gate and biases aside, in the launches of a case."""
    aside = {"K": 0, "SIGMOID": 0, "BIASED": 0}
    return {
        (launch.kernel.__name__, *sorted((launch.constants | aside).items()))
        for launch in compile_ahead.launches(
            case, torch.float16, gradients=True, shared=device_memory
        )
    }


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_self_test_runs_what_real_models_compile(target):
    memory = compile_ahead.SHARED[target]
    tested = {size: selftest.cases(size, torch.device("cuda")) for size in selftest.KERNEL_SIZES}
    ran = set().union(*(variants(case, memory) for pair in tested.values() for case in pair))
    sites = [row for model in shapes.MODELS.values() for row, _ in model] + list(shapes.ROWS)
    for row in sites:
        case = Case(2, row.side, row.side, row.dim, row.kernel_size, gate=row.gate)
        missing = variants(case, memory) - ran
        assert not missing, f"{row}: {missing}"
    assert {len(case.scales) for pair in tested.values() for case in pair} == {2, 3}
    found = {case.biased for pair in tested.values() for case in pair}
    assert found == {(), (0,), (1,), (0, 1)}
    for pair in tested.values():
        assert {case.gate for case in pair} == {"scaled", "sigmoid"}


def test_bare_launches_refuse_to_lose_a_gradient():
    case = Case(1, 3, 3, 8, 3)
    inputs = accuracy.make_inputs(case, torch.float32, DEVICE)
    inputs[6].requires_grad_()
    with pytest.raises(RuntimeError, match="kernels"):
        accuracy.project(case, inputs, forward.pyramid_projection)
    with pytest.raises(RuntimeError, match="kernels"):
        forward.gated_pyramid(inputs[1], inputs[6:], case.scales, case.gate)
    assert backward is not None


def test_nothing_is_read_behind_the_end_of_a_tensor():
    # Weights of another size once gave a picture of whatever lay behind them in memory.
    case = Case(1, 4, 4, 16, 3)
    inputs = accuracy.make_inputs(case, torch.float32, DEVICE)
    inputs[4], inputs[5] = inputs[4][:8, :8], inputs[5][:8]
    with pytest.raises(ValueError, match=r"pool_weight .*\[8, 8\]; pool_bias .*\[8\]"):
        accuracy.project(case, inputs)


def test_float64_is_refused_when_triton_is_forced():
    inputs = accuracy.make_inputs(Case(1, 3, 3, 8, 3), torch.float64, DEVICE)
    with pytest.raises(RuntimeError, match=r"fp16, bf16 and fp32, not torch.float64"):
        kernels.gated_pyramid(inputs[1], inputs[6:], (1.0, 0.5), "scaled")


LARGE = {
    "65 by 63": Case(3, 65, 63, 320, 9),
    "512 by 3": Case(1, 512, 3, 64, 13, gate="sigmoid"),
    "2048 by 2048": Case(1, 2048, 2048, 64, 7),
    "SDXL": Case(2, 32, 32, 1280, 9),
    "kernel 17": Case(2, 40, 56, 320, 17),
}


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: the interpreter takes minutes at these sizes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large_maps(case, dtype):
    assert_within_budget(accuracy.forward_errors(case, dtype, DEVICE), dtype)


def corners(case, tensor, side):
    """The four corners of every map of tensor [B, H, W, ·], as views [1, side, side, ·]."""
    rows, columns = (
        (slice(0, side), slice(size - side, size)) for size in (case.height, case.width)
    )
    images = range(case.batch)
    return [tensor[i : i + 1, row, column] for i in images for row in rows for column in columns]


def by_the_definition(case, means, crops, upstream, weights, dtype, device):
    """Results where `upstream` is not 0, gradients of `crops`, and of the weights over all."""
    weights = [weight.detach().to(device, dtype).requires_grad_() for weight in weights]
    results, to_u = [], []
    to_weights = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    for mean, u, gradient in zip(means, crops, upstream, strict=True):
        mean, u, gradient = (t.detach().to(device, dtype) for t in (mean, u, gradient))
        inputs = [mean[None], u.requires_grad_(), *weights]
        result = accuracy.project(case, inputs, kernels.pyramid_projection_definition)
        here, *rest = torch.autograd.grad(result, inputs[1:], gradient)
        results.append(result[gradient != 0].detach())
        to_u.append(here)
        for total, one in zip(to_weights, rest, strict=True):
            total += one
    return [torch.cat(results), torch.cat(to_u), *to_weights]


# u and all that is larger exceed 2³¹ elements: within one map, and between maps. 65 GB.
BEYOND = {"one map": Case(1, 4096, 4096, 320, 3), "many maps": Case(8, 1456, 1456, 320, 3)}
ROOM = HAS_GPU and DEVICE == "cuda" and torch.cuda.mem_get_info()[1] > 75e9
TOO_SMALL = pytest.mark.skipif(not ROOM, reason="needs a GPU with 80 GB: more than 2³¹ elements")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(2, 16, 16, 8, 3), id="small"),
        *(pytest.param(case, id=name, marks=TOO_SMALL) for name, case in BEYOND.items()),
    ],
)
def test_corners_of_a_map_of_any_size(case):
    dtype, shape = torch.float16, case[:3]
    options = {"dtype": dtype, "device": DEVICE}
    torch.manual_seed(0)
    one = accuracy.make_inputs(case._replace(batch=1, height=1, width=1), dtype, DEVICE)
    weights = [weight.requires_grad_() for weight in one[2:]]
    u = torch.randn(*shape, case.dim // 2, **options).requires_grad_()
    # Rows behind the middle alone have a mean: those read in their place would show.
    x = torch.zeros(*shape, case.dim, **options)
    x[:, case.height // 2 :] = torch.randn(case.dim, **options)
    result = accuracy.project(case, [x, u, *weights])
    # Only corners of four positions weigh: every gradient is a sum over them.
    upstream = torch.zeros_like(result)
    for corner in corners(case, upstream, 4):
        corner.normal_()
    to_u, *to_weights = torch.autograd.grad(result, [u, *weights], upstream)

    # Eight positions hold all that the four depend on, and begin where a pooled position does.
    means = x.mean(dim=(1, 2), keepdim=True, dtype=torch.float64).repeat_interleave(4, 0)
    weighing = corners(case, upstream, 8)
    results = zip(corners(case, result.detach(), 8), weighing, strict=True)
    ours = [torch.cat([corner[weighs != 0] for corner, weighs in results])]
    ours += [torch.cat(corners(case, to_u, 8)), *to_weights]
    arguments = (case, means, corners(case, u, 8), weighing, weights)
    exact = by_the_definition(*arguments, torch.float64, "cpu")
    own = by_the_definition(*arguments, dtype, DEVICE)
    names = ("result", *accuracy.NAMES[1:], "kernel 0", "kernel 1")
    errors = [
        (name, accuracy.distance(a, e), accuracy.distance(b, e))
        for name, a, b, e in zip(names, ours, own, exact, strict=True)
    ]
    assert_within_budget(errors, dtype)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: CUDA graphs")
def test_a_captured_graph_replays():
    case = Case(2, 32, 32, 320, 7)
    inputs = accuracy.make_inputs(case, torch.float16, DEVICE)
    with torch.no_grad():
        expected = accuracy.project(case, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = accuracy.project(case, inputs)
        result.zero_()
        graph.replay()
    assert torch.equal(result, expected)
