"""A site's projection: launches prepared once, used only for the tensors they were made for."""

import copy
import ctypes
import os
import pickle
from typing import NamedTuple

import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock
from comfyui_deltaconv.kernels import (
    Projections,
    SiteProjection,
    pyramid_projection,
    site,
    trained,
)

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # What is decorated while this is set is interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed for this system")
from comfyui_deltaconv.kernels.fused import direct, driver, plan_gradients  # noqa: E402
from comfyui_deltaconv.kernels.fused.plan import plan_forward  # noqa: E402
from comfyui_deltaconv.kernels.fused.workspace import WIDE, Tensors  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)


class Metadata(NamedTuple):
    """What Triton says of a kernel, as far as a launch reads it."""

    num_warps: int = 4
    shared: int = 128
    num_ctas: int = 1
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False
    global_scratch_size: int = 0
    profile_scratch_size: int = 0


class Source(NamedTuple):
    signature: dict[str, str]


class Compiled(NamedTuple):
    """A kernel that Triton compiled and loaded."""

    function: int
    src: Source
    metadata: Metadata = Metadata()


class Driver:
    """Stands for CUDA's: notes the arguments of every launch, read where the driver reads them."""

    surplus = (8, 8)

    def __init__(self):
        self.compiled: dict[int, tuple] = {}
        self.launched = []
        self.error = 0
        # Whether launches run, in the interpreter, on the addresses that they are given.
        self.plays = False

    def compile(self, launch, **metadata):
        """Gives the launch a compiled kernel with the signature that Triton would make."""
        kinds = {float: "fp32", int: "i32"}
        signature = {}
        for name in launch.kernel.arg_names:
            if name in launch.constants:
                signature[name] = "constexpr"
            elif name in launch.numbers:
                # Triton makes a one a constant.
                number = launch.numbers[name]
                signature[name] = "constexpr" if number == 1 else kinds[type(number)]
            else:
                missing = name.startswith(("bias", "to_bias")) and not launch.constants["BIASED"]
                signature[name] = "constexpr" if missing else "*fp16"
        function = 1000 + len(self.compiled)
        self.compiled[function] = (launch, signature)
        launch.compiled = Compiled(function, Source(signature), Metadata(**metadata))

    def sizes(self, library, function):
        _, signature = self.compiled[function]
        sizes = {"i32": 4, "fp32": 4}
        return [
            *(sizes.get(kind, 8) for kind in signature.values() if kind != "constexpr"),
            *self.surplus,
        ]

    def launch(self, config, function, parameters, extra):
        launch, signature = self.compiled[function]
        names = [name for name, kind in signature.items() if kind != "constexpr"]
        count = len(names) + len(self.surplus)
        places = (ctypes.c_void_p * count).from_address(parameters)
        given = {}
        for name, place in zip(names, places, strict=False):
            kind = {"i32": ctypes.c_int, "fp32": ctypes.c_float}.get(
                signature[name], ctypes.c_uint64
            )
            given[name] = kind.from_address(place).value
        for place in places[len(names) :]:
            assert ctypes.c_uint64.from_address(place).value == 0
        settings = driver.Config.from_address(config)
        self.launched.append((launch, settings.gridX, settings.blockX, settings.stream, given))
        if self.plays:
            tensors = [at(given[name], name) if name in given else None for name in launch.tensors]
            launch.kernel[(settings.gridX, 1, 1)](*tensors, *launch.tail, **launch.options)
        return self.error


def at(address, name):
    """A tensor that begins there; kernels read as far as they are told."""
    memory = (ctypes.c_uint8 * 16).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32 if name in WIDE else torch.float16)


@pytest.fixture
def cuda(monkeypatch):
    """Preparation as on a GPU, down to the driver's call; kernels run in the interpreter before."""
    if HAS_GPU:
        pytest.skip("a GPU runs the real driver; see the last test")
    pretended = Driver()
    monkeypatch.setenv("DELTACONV_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(site, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(site, "current_device", lambda: None)
    monkeypatch.setattr(direct, "cuda_library", lambda: driver.Library(pretended.launch, print))
    monkeypatch.setattr(driver, "parameter_sizes", pretended.sizes)
    from triton.runtime import driver as triton_driver

    class Active:
        @staticmethod
        def get_current_stream(index):
            return 77

    monkeypatch.setattr(type(triton_driver), "active", property(lambda self: Active()))
    plan_forward.cache_clear()
    made = direct.plan_forward

    def compiled_plan(*arguments):
        plan = made(*arguments)
        for launch in plan.launches:
            if launch.compiled is None:
                pretended.compile(launch)
        return plan

    monkeypatch.setattr(direct, "plan_forward", compiled_plan)
    planned = plan_gradients.plan_gradients
    planned.cache_clear()

    def compiled_gradients(*arguments):
        plan = planned(*arguments)
        for step in plan.steps:
            if step.launch.compiled is None:
                pretended.compile(step.launch)
        return plan

    monkeypatch.setattr(plan_gradients, "plan_gradients", compiled_gradients)
    monkeypatch.setattr(trained, "current_device", lambda: None)
    yield pretended
    planned.cache_clear()
    plan_forward.cache_clear()


def block_of(dim=16, kernel_size=3, device="cpu"):
    torch.manual_seed(0)
    block = DeltaConvBlock(dim, kernel_size, dtype=torch.float16, device=device)
    return block.requires_grad_(False)


def map_of(height=4, width=5, dim=16, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, height, width, dim, generator=generator).to(device, torch.float16)


def met(block, *maps):
    """Calls the block until it is prepared: the first call notes the weights, the next compiles."""
    block(maps[0])
    return [block(x) for x in maps]


@torch.inference_mode()
def test_every_argument_arrives_where_the_driver_reads_it(cuda):
    block, x = block_of(), map_of()
    (expected,) = met(block, x)
    assert not cuda.launched
    result = block(x)
    assert result.shape == expected.shape and result.dtype == expected.dtype
    kernels = [launch.kernel.__name__ for launch, *_ in cuda.launched]
    assert kernels == ["pool_kernel", "gated_kernel", "upsample_kernel", "project_kernel"]
    known = {
        "x": x,
        "weight0": block.gates[0].conv_spatial.weight,
        "weight1": block.gates[1].conv_spatial.weight,
        # The pyramid has no third level: any address will do.
        "weight2": block.gates[0].conv_spatial.weight,
        "out_weight": block.conv_out.weight,
        "out_bias": block.conv_out.bias,
        "pool_weight": block.conv_pool.weight,
        "pool_bias": block.conv_pool.bias,
        "result": result,
    }
    memory = {}
    for launch, programs, threads, stream, given in cuda.launched:
        assert (programs, threads, stream) == (launch.programs, 128, 77)
        for name, value in given.items():
            if name in launch.numbers:
                assert value == pytest.approx(launch.numbers[name])
            elif name in known:
                assert value == known[name].data_ptr(), name
            elif name != "u":
                # The same place of the working memory in every launch.
                assert name in Tensors._fields and value % 256 == memory.setdefault(
                    "start", value % 256
                ), name
                assert memory.setdefault(name, value) == value
    assert len({memory[name] for name in ("low", "gated_low", "partial", "pyramid")}) == 4


@torch.inference_mode()
def test_a_refused_launch_is_an_error(cuda):
    block, x = block_of(), map_of()
    met(block, x)
    cuda.error = 719
    with pytest.raises(RuntimeError, match="719"):
        block(x)


def replaced_weight(block):
    block.conv_out.weight = torch.nn.Parameter(block.conv_out.weight + 1, requires_grad=False)


def moved_data(block):
    block.gates[1].conv_spatial.weight.data = block.gates[1].conv_spatial.weight.data.clone()


def turned_in_place(block):
    block.conv_pool.weight.data = block.conv_pool.weight.data.t()


@torch.inference_mode()
@pytest.mark.parametrize("change", [replaced_weight, moved_data, turned_in_place])
def test_other_weights_are_prepared_anew(cuda, change):
    block, x = block_of(), map_of()
    met(block, x)
    block(x)
    assert len(cuda.launched) == 4
    change(block)
    definition = DeltaConvBlock.from_state(block.state_dict())
    got = block(x)
    # Nothing was launched with the addresses of before.
    assert len(cuda.launched) == 4
    with torch.no_grad():
        assert torch.equal(got, definition(x))


@torch.inference_mode()
def test_every_shape_and_thread_has_its_own(cuda):
    import threading

    block, maps = block_of(), [map_of(4, 5), map_of(5, 4)]
    met(block, *maps)
    for x in maps:
        block(x)
    assert len(cuda.launched) == 8

    def other():
        with torch.inference_mode():
            block(maps[0])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    # The first call of another thread prepares its own.
    assert len(cuda.launched) == 8


@torch.inference_mode()
@pytest.mark.parametrize("inputs", ["strided", "unaligned"])
def test_inputs_that_no_kernel_reads_are_copied_as_before(cuda, inputs):
    block, x = block_of(), map_of()
    met(block, x)
    block(x)
    u, (kernels, biases) = block.conv_up(x), block.depthwise_like(x)
    projections = Projections(
        *(t for linear in (block.conv_out, block.conv_pool) for t in (linear.weight, linear.bias))
    )
    if inputs == "strided":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        x = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    arguments = (x, u, kernels, block.scales, block.gate, projections, biases)
    assert torch.equal(block._project(*arguments), pyramid_projection(*arguments))
    assert len(cuda.launched) == 4


@torch.inference_mode()
def test_torch_by_request_is_obeyed_at_any_time(cuda, monkeypatch):
    block, x = block_of(), map_of()
    met(block, x)
    block(x)
    monkeypatch.setenv("DELTACONV_KERNELS", "torch")
    block(x)
    assert len(cuda.launched) == 4


def with_biases(scales, biased):
    torch.manual_seed(0)
    block = DeltaConvBlock(8, 3, scales, biased=biased).half()
    for each in block.parameters():
        torch.nn.init.normal_(each, std=0.5)
    return block


@pytest.mark.parametrize(("scales", "biased"), [((1.0, 0.5, 1 / 3), (1,)), ((1.0,), ())], ids=str)
def test_prepared_passes_have_the_gradients_of_those_before(cuda, scales, biased):
    block, x = with_biases(scales, biased), map_of(dim=8, height=3).requires_grad_()
    upstream = map_of(dim=8, height=3, seed=2)

    def step():
        y = block(x)
        return (y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], upstream))

    with torch.no_grad():
        (expected,) = met(block, x)
    cuda.plays = True
    # The first backward pass prepares the next.
    before = step()
    assert torch.equal(before[0], expected) and len(cuda.launched) == 4
    cuda.launched.clear()
    prepared = step()
    # Three for every level's gradients, and one each before and behind them.
    assert len(cuda.launched) == 4 + 2 + 3 * len(scales)
    assert {stream for _, _, _, stream, _ in cuda.launched} == {77}
    for ours, own in zip(prepared, before, strict=True):
        assert ours.abs().max() > 0 and torch.equal(ours, own)


def test_gradients_are_never_lost(cuda):
    block, x = block_of(), map_of().requires_grad_()
    with torch.no_grad():
        met(block, x)
        block(x)
    cuda.plays = True
    block(x).sum().backward()
    # The backward pass is prepared by its first run.
    assert x.grad is not None and len(cuda.launched) == 8


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_ctas", 2), ("launch_cooperative_grid", True), ("global_scratch_size", 4)],
)
def test_unusual_kernels_keep_tritons_launcher(cuda, monkeypatch, name, value):
    block, x = block_of(), map_of()
    monkeypatch.setattr(
        cuda, "compile", lambda launch: Driver.compile(cuda, launch, **{name: value})
    )
    for _ in range(3):
        block(x)
    assert not cuda.launched


@torch.inference_mode()
@pytest.mark.parametrize("surplus", [(4,), (8, 8, 8)])
def test_parameters_that_the_driver_reports_otherwise_keep_tritons_launcher(cuda, surplus):
    cuda.surplus = surplus
    block, x = block_of(), map_of()
    for _ in range(3):
        block(x)
    assert not cuda.launched


@torch.inference_mode()
def test_what_is_prepared_is_neither_copied_nor_saved(cuda):
    block, x = block_of(), map_of()
    met(block, x)
    assert block._project._prepared
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert isinstance(other._project, SiteProjection) and not other._project._prepared
        assert torch.equal(other(x), pickle.loads(pickle.dumps(other))(x))


def test_weights_of_one_call_are_not_kept():
    import gc
    import weakref

    block, x = block_of(), map_of()
    weight = torch.nn.Parameter(block.conv_out.weight.clone(), requires_grad=False)
    block.conv_out.weight = weight
    with torch.inference_mode():
        block(x)
    gone = weakref.ref(weight)
    block.conv_out.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    del weight
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: the driver's own launch")
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "size", "k"), [(320, (64, 64), 7), (640, (33, 20), 9), (64, (7, 5), 3)]
)
def test_the_drivers_launches_give_tritons_bits(dtype, dim, size, k):
    block = block_of(dim, k, "cuda").to(dtype)
    for seed in range(4):
        x = map_of(*size, dim, "cuda", seed).to(dtype)
        got = block(x)
        # A copy starts with Triton's own launches.
        expected = copy.deepcopy(block)(x)
        assert torch.equal(got, expected)
    assert [*block._project._prepared.values()] != [None]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block(x)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
