"""Blocks with pooled tokens: the attention's definition, what tensors say, files, arithmetic."""

import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock, read_weights, write_weights
from comfyui_deltaconv.deltaconv.flops import block_flops
from comfyui_deltaconv.deltaconv.geometry import BlockGeometry, BlockPlan, read_geometry
from comfyui_deltaconv.deltaconv.tokens import SIDE
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
from einops import einsum, rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile


def cells(size, count):
    """The rows that each of `count` means is over: adaptive pooling's, which may overlap."""
    return [range(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def weights_of_rows(size, count):
    """[size, count]: what of each of `count` tokens a row gets, bilinear between their middles."""
    shares = torch.zeros(size, count, dtype=torch.float64)
    for row in range(size):
        at = min(max((row + 0.5) * count / size - 0.5, 0.0), count - 1.0)
        low = min(int(at), count - 1)
        high = min(low + 1, count - 1)
        shares[row, low] += 1 - (at - low)
        shares[row, high] += at - low
    return shares


def definition(tokens, x):
    """x [B, H, W, C] float64 → [B, H, W, C], cell by cell."""
    height, width = x.shape[1:3]
    rows, columns = min(height, SIDE), min(width, SIDE)
    means = torch.stack(
        [
            torch.stack([x[:, r][:, :, c].mean((1, 2)) for c in map(list, cells(width, columns))])
            for r in map(list, cells(height, rows))
        ]
    )
    q, k, v = rearrange(
        rearrange(means, "h w b c -> b (h w) c") @ tokens.qkv.weight.T,
        "b n (three heads d) -> three b heads n d",
        three=3,
        heads=len(tokens.scale.weight),
    )
    scores = einsum(q, k, "b heads n d, b heads m d -> b heads n m")
    seen = (scores * tokens.scale.weight[:, None, None]).softmax(-1) @ v
    seen = rearrange(seen, "b heads n d -> b n (heads d)") @ tokens.out.weight.T
    seen = rearrange(seen, "b (h w) c -> b h w c", h=rows)
    shares = weights_of_rows(height, rows), weights_of_rows(width, columns)
    return einsum(*shares, seen, "y h, x w, b h w c -> b y x c")


def block_of(dim=8, kernel=3, heads=2, seed=0, **named):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = DeltaConvBlock(dim, kernel, heads=heads, **named)
        block.tokens.scale.weight.data.uniform_(0.2, 2.0)
    return block.requires_grad_(False)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 21),
    st.integers(1, 21),
    st.sampled_from([(8, 1), (8, 2), (12, 3)]),
    st.sampled_from([{}, {"scales": (1.0,)}, {"biased": (1,), "gate": "sigmoid"}]),
    st.integers(0, 2**32 - 1),
)
def test_any_map_meets_the_definition(batch, height, width, shape, named, seed):
    dim, heads = shape
    block = block_of(dim, heads=heads, seed=seed, **named).double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, height, width, dim, generator=generator).double()
    expected = definition(block.tokens, x)
    assert (block.tokens(x) - expected).abs().max() < 1e-10
    assert (block(x) - block.convolved(x) - expected).abs().max() < 1e-10
    with torch.no_grad():
        assert (block(x) - block.convolved(x) - expected).abs().max() < 1e-10


def test_a_token_sees_the_whole_map_and_a_convolution_does_not():
    block = block_of()
    x = torch.randn(1, 64, 64, 8, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    # Without the mean changed, which the pooled constant would see.
    changed[:, :4, :4] += 1
    changed[:, 4:8, :4] -= 1
    far = (slice(None), slice(48, None), slice(48, None))
    convolved = (block.convolved(changed) - block.convolved(x))[far]
    assert convolved.abs().max() < 1e-5
    changed[:, :8, :8] += 1
    assert (block.tokens(changed) - block.tokens(x))[far].abs().max() > 1e-4


def test_every_tensor_has_a_gradient():
    block = block_of().requires_grad_(True)
    x = torch.randn(2, 10, 9, 8, requires_grad=True)
    block(x).square().sum().backward()
    for name, parameter in (*block.named_parameters(), ("x", x)):
        assert parameter.grad.abs().sum() > 0, name


def test_gradients_are_those_of_differences():
    block = block_of().double().requires_grad_(True)
    x = torch.randn(1, 9, 10, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block.tokens, (x,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_is_as_near_as_its_digits(dtype, limit):
    block, x = block_of(32, heads=4), torch.randn(2, 16, 12, 32)
    expected = block(x)
    block.to(dtype)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            got = block(x.to(dtype)).float()
        assert (got - expected).norm() / expected.norm() < limit


def test_without_a_record_a_map_is_passed_over_less_often():
    """Neither its mean nor a sum of two maps is computed: on a CPU these are what tokens cost."""
    block, x = block_of(32, heads=4, scales=(1.0,)), torch.randn(1, 32, 32, 32)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        block(x)
    maps = {
        event.key
        for event in seen.key_averages(group_by_input_shape=True)
        if [1, 32, 32, 32] in event.input_shapes
    }
    assert maps.isdisjoint({"aten::mean", "aten::add", "aten::add_", "aten::cat"})


@pytest.mark.parametrize("name", ["conv_up", "conv_out", "conv_pool", "tokens", "tokens.out"])
def test_modules_that_are_listened_to_are_called(name):
    block, x = block_of(32, heads=4), torch.randn(2, 9, 16, 32)
    expected, calls = block(x), []
    block.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert (block(x) - expected).abs().max() < 1e-5
    assert calls == [1]


def test_a_scale_in_another_dtype_is_cast():
    block, x = block_of(), torch.randn(1, 8, 8, 8).bfloat16()
    block.bfloat16()
    expected = block(x)
    block.tokens.scale.weight.data = block.tokens.scale.weight.data.float()
    assert torch.equal(block(x), expected)


def test_tensors_alone_say_what_the_block_is():
    block = block_of(16, 5, heads=4, scales=(1.0, 0.25), gate="sigmoid")
    state = block.state_dict()
    geometry = read_geometry({name: tensor.shape for name, tensor in state.items()})
    assert geometry == BlockPlan(5, (1.0, 0.25), heads=4).geometry(16)
    assert geometry.parameters == sum(tensor.numel() for tensor in state.values())
    again = DeltaConvBlock.from_state(state, gate="sigmoid", scales=(1.0, 0.25))
    x = torch.randn(1, 9, 9, 16)
    assert again.heads == 4 and torch.equal(again(x), block(x))
    assert "heads=4" in repr(again)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"tokens.scale.weight": None},
            "not part of a block: tokens.out.weight, tokens.qkv.weight",
        ),
        ({"tokens.qkv.weight": None}, "missing: tokens.qkv.weight"),
        ({"tokens.scale.weight": (3,)}, "heads must divide dim"),
        ({"tokens.scale.weight": (2, 1)}, r"tokens.scale.weight is \[2, 1\], expected \[2\]"),
        ({"tokens.scale.weight": ()}, r"tokens.scale.weight is \[\], expected \[1\]"),
        ({"tokens.scale.weight": (0,)}, "not part of a block"),
        ({"tokens.out.weight": (8, 4)}, r"tokens.out.weight is \[8, 4\], expected \[8, 8\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, sentence):
    shapes = {name: tuple(tensor.shape) for name, tensor in block_of().state_dict().items()}
    shapes |= change
    with pytest.raises(ValueError, match=sentence):
        read_geometry({name: shape for name, shape in shapes.items() if shape is not None})


@pytest.mark.parametrize("heads", [3, -1, 16])
def test_heads_that_do_not_divide_the_channels_are_refused(heads):
    with pytest.raises(ValueError, match="heads must divide dim, or be 0"):
        DeltaConvBlock(8, 3, heads=heads)


def test_files_keep_the_tokens(tmp_path):
    block = block_of(320, 3, heads=8)
    site = "input_blocks.1.1.transformer_blocks.0.attn1"
    weights = weights_of_blocks({site: block}, family="sd1")
    read = read_weights(write_weights(weights, tmp_path / "a.safetensors"))
    assert read.sites == weights.sites and read.sites[site].heads == 8
    x = torch.randn(1, 8, 8, 320)
    assert torch.equal(read.block(site)(x), block(x))


def test_operations_of_the_tokens_are_counted():
    without, tokens = BlockGeometry(8, 3, 2), BlockGeometry(8, 3, 2, heads=2)

    def added(height, width):
        sizes = ((1.0, 0.5), height, width)
        return block_flops(tokens, *sizes) - block_flops(without, *sizes)

    # Four projections of 64 tokens, their scores and sums; fewer on a map with fewer cells.
    assert added(64, 32) == added(8, 8) == 2 * (4 * 64 * 64 + 2 * 64 * 64 * 8)
    assert added(4, 100) == 2 * (4 * 32 * 64 + 2 * 32 * 32 * 8)


def test_a_compiled_block_computes_and_trains_without_a_break():
    block = block_of().requires_grad_(True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((7, 5), (16, 9)):
        x = torch.randn(2, *size, 8)
        gradients = []
        for function in (block, compiled):
            function(x).square().sum().backward()
            gradients.append([parameter.grad for parameter in block.parameters()])
            block.zero_grad()
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x))
