"""The ΔConvBlock against the golden tensors, its layouts, its edges and its refusals."""

import json

import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock
from comfyui_deltaconv.kernels import gated_pyramid_definition, pooled_size
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = (
    "sd_wide",
    "sd_square",
    "sd_odd",
    "pixart",
    "three_scales",
    "small_kernel_bigger_than_map",
)
# Of the authors' releases: with biases of the depthwise convolutions, or without conv_up's.
GOLDEN_BIAS = (
    "bias_scaled",
    "bias_sigmoid_odd",
    "bias_three",
    "bias_small_map",
    "bias_no_up_bias",
    "no_up_bias",
)


def golden_case(data, case):
    """meta, x, state and y of one golden case."""
    path = data / ("block_bias.safetensors" if case in GOLDEN_BIAS else "block.safetensors")
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()[case])
    tensors = load_file(path)
    state = {k.split(".w.")[1]: t for k, t in tensors.items() if k.startswith(f"{case}.w.")}
    return meta, tensors[f"{case}.x"], state, tensors[f"{case}.y"]


@pytest.mark.parametrize("case", GOLDEN + GOLDEN_BIAS)
def test_block_meets_golden(data, case):
    meta, x, state, y = golden_case(data, case)
    block = DeltaConvBlock.from_state(state, gate=meta["gate"], scales=meta["scales"])
    assert (block.dim, block.kernel_size) == (meta["dim"], meta["kernel"])
    with torch.no_grad():
        error = (block(x) - y).abs().max() / y.abs().max()
    assert error < 1e-5


def test_golden_cases_are_all_tested(data):
    for name, cases in {"block": GOLDEN, "block_bias": GOLDEN_BIAS}.items():
        with safe_open(data / f"{name}.safetensors", framework="pt") as file:
            assert set(file.metadata()) == set(cases)


def other_layout(state):
    """The same weights as 1 × 1 convolutions and [h, 1, k, k] kernels."""
    return {
        name: tensor.permute(2, 0, 1).unsqueeze(1)
        if name.endswith("conv_spatial.weight")
        else (tensor[:, :, None, None] if name.endswith("weight") else tensor)
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("case", GOLDEN + GOLDEN_BIAS)
def test_both_layouts_are_the_same_block(data, case):
    meta, x, state, _ = golden_case(data, case)
    blocks = [
        DeltaConvBlock.from_state(s, gate=meta["gate"], scales=meta["scales"])
        for s in (state, other_layout(state))
    ]
    assert torch.equal(*(block(x) for block in blocks))


def test_from_state_does_not_share_memory(data):
    _, _, state, _ = golden_case(data, "sd_odd")
    kept = {name: tensor.clone() for name, tensor in state.items()}
    block = DeltaConvBlock.from_state(state)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert all(torch.equal(state[name], kept[name]) for name in state)


def test_published_names_round_trip(data):
    _, x, state, _ = golden_case(data, "three_scales")
    block = DeltaConvBlock.from_state(state)
    assert set(block.state_dict()) == set(state)
    again = DeltaConvBlock.from_state(block.state_dict())
    assert torch.equal(block(x), again(x))


def written_out(block, x):
    """The published function for one position at a time, in plain loops over float64 numbers."""
    b, height, width, _ = x.shape
    inner = block.dim // 2
    half, k = inner // 2, block.kernel_size
    u = x @ block.conv_up.weight.T + block.conv_up.bias
    pyramid = []
    for gate, scale in zip(block.gates, block.scales, strict=True):
        rows, columns = (height, width) if scale == 1 else pooled_size(height, width, scale)
        v = torch.zeros(b, rows, columns, inner, dtype=x.dtype)
        for i in range(rows):
            for j in range(columns):
                top, bottom = i * height // rows, -(-(i + 1) * height // rows)
                left, right = j * width // columns, -(-(j + 1) * width // columns)
                v[:, i, j] = u[:, top:bottom, left:right].mean(dim=(1, 2))
        bias = gate.conv_spatial.bias
        c = torch.zeros_like(v) if bias is None else torch.zeros_like(v) + bias
        for i in range(rows):
            for j in range(columns):
                for di in range(k):
                    for dj in range(k):
                        y, z = i + di - k // 2, j + dj - k // 2
                        if 0 <= y < rows and 0 <= z < columns:
                            c[:, i, j] += v[:, y, z] * gate.conv_spatial.weight[di, dj]
        a, g = c[..., :half], c[..., half:]
        v = a * g * half**0.5 if block.gate == "scaled" else a / (1 + torch.exp(-g))
        full = torch.zeros(b, height, width, half, dtype=x.dtype)
        for i in range(height):
            for j in range(width):
                y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
                z = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
                y0, z0 = int(y), int(z)
                y1, z1 = min(y0 + 1, rows - 1), min(z0 + 1, columns - 1)
                top = v[:, y0, z0] * (1 - z + z0) + v[:, y0, z1] * (z - z0)
                bottom = v[:, y1, z0] * (1 - z + z0) + v[:, y1, z1] * (z - z0)
                full[:, i, j] = top * (1 - y + y0) + bottom * (y - y0)
        pyramid.append(full)
    out = torch.cat(pyramid, dim=-1) @ block.conv_out.weight.T + block.conv_out.bias
    pooled = x.mean(dim=(1, 2)) @ block.conv_pool.weight.T + block.conv_pool.bias
    return out + pooled[:, None, None]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5, 7]),
    dim=st.sampled_from([4, 8, 12]),
    scales=st.sampled_from([(1.0,), (1.0, 0.5), (1.0, 0.5, 1 / 3), (0.5,)]),
    gate=st.sampled_from(["scaled", "sigmoid"]),
    biased=st.sampled_from([(), (0,), (1,), (0, 2), (0, 1, 2)]),
)
def test_block_is_the_published_function_at_any_size(
    batch, height, width, kernel, dim, scales, gate, biased
):
    torch.manual_seed(0)
    biased = [level for level in biased if level < len(scales)]
    block = DeltaConvBlock(dim, kernel, scales, gate, biased=biased, dtype=torch.float64)
    with torch.no_grad():
        for level in biased:
            block.gates[level].conv_spatial.bias.normal_()
    x = torch.randn(batch, height, width, dim, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), written_out(block, x), rtol=1e-9, atol=1e-9)


def test_gradients_of_the_definition():
    torch.manual_seed(0)
    u = torch.randn(1, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def run(u, *weights):
        return gated_pyramid_definition(u, weights, (1.0, 0.5), "scaled")

    assert torch.autograd.gradcheck(run, (u, *weights))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dim": 6}, "multiple of 4"),
        ({"dim": 0}, "multiple of 4"),
        ({"kernel_size": 4}, "odd and positive"),
        ({"kernel_size": -1}, "odd and positive"),
        ({"scales": ()}, "scales must be"),
        ({"scales": (1.0, 0.0)}, "scales must be"),
        ({"scales": (2.0,)}, "scales must be"),
        ({"gate": "tanh"}, "gate must be one of"),
        ({"biased": (2,)}, "biased must be indices"),
        ({"biased": (-1,)}, "biased must be indices"),
    ],
)
def test_impossible_geometry_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        DeltaConvBlock(**{"dim": 8, "kernel_size": 3, **arguments})


def test_several_problems_are_named_at_once():
    with pytest.raises(ValueError) as error:
        DeltaConvBlock(6, 4, (), "tanh")
    for word in ("dim=6", "kernel_size=4", "scales=()", "gate='tanh'"):
        assert word in str(error.value)


def test_bad_states_list_everything(data):
    _, _, state, _ = golden_case(data, "sd_odd")
    state.pop("conv_out.bias")
    state.pop("gates.1.conv_spatial.weight")
    state["to_q.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        DeltaConvBlock.from_state({**state, "gates.2.conv_spatial.weight": torch.zeros(5, 5, 16)})
    for name in ("conv_out.bias", "gates.1.conv_spatial.weight", "to_q.weight"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv_up.weight", (16, 31)),
        ("conv_up.bias", (17,)),
        ("gates.0.conv_spatial.bias", (17,)),
        ("gates.1.conv_spatial.bias", (16, 1)),
        ("gates.2.conv_spatial.bias", (16,)),
        ("gates.1.conv_spatial.weight", (3, 3, 16)),
        ("gates.0.conv_spatial.weight", (5, 3, 16)),
        ("conv_pool.weight", (32, 32, 3, 3)),
        ("conv_out.weight", (32,)),
        ("conv_out.bias", ()),
    ],
)
def test_misshapen_tensors_are_named(data, name, shape):
    _, _, state, _ = golden_case(data, "sd_odd")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        DeltaConvBlock.from_state({**state, name: torch.zeros(shape)})


def test_scales_must_match_the_gates(data):
    _, _, state, _ = golden_case(data, "sd_odd")
    with pytest.raises(ValueError, match="2 scales"):
        DeltaConvBlock.from_state(state, scales=(1.0,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_dtype_and_the_result(data, dtype):
    _, x, state, y = golden_case(data, "sd_square")
    block = DeltaConvBlock.from_state({name: tensor.to(dtype) for name, tensor in state.items()})
    with torch.no_grad():
        got = block(x.to(dtype))
    assert got.dtype == dtype
    # Eight and eleven bits of mantissa through two projections, a convolution and a product.
    bound = 8 * torch.finfo(dtype).eps
    assert (got.float() - y).norm() / y.norm() < bound
