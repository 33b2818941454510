"""Blocks of ComfyUI's Linears as one fused op: what is lent, and when modules are called."""

import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock, demo, read_weights
from comfyui_deltaconv.kernels import SiteProjection
from comfyui_deltaconv.kernels.accuracy import distance

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def plain_block():
    torch.manual_seed(0)
    return DeltaConvBlock(16, 5)


def casting_block(storage, operations=None):
    """A block of ComfyUI's Linears with the weights of `plain_block` in that dtype."""
    from comfyui_deltaconv.nodes.host.ops import LendingCast

    state = {name: tensor.to(storage) for name, tensor in plain_block().state_dict().items()}
    operations = operations or LendingCast
    return DeltaConvBlock.from_state(state, operations=operations).requires_grad_(False)


def map_of(dtype):
    torch.manual_seed(1)
    return torch.randn(2, 7, 9, 16).to(dtype)


@pytest.fixture
def fused(monkeypatch):
    """A list that grows with every fused op that a block runs."""
    calls = []
    real = SiteProjection.__call__

    def counted(*arguments):
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(SiteProjection, "__call__", counted)
    return calls


def add_low_rank(linear, scale=0.3):
    """What ComfyUI attaches where it does not merge a LoRA: functions on weight and bias."""
    torch.manual_seed(2)
    up, down = torch.randn(linear.out_features, 2), torch.randn(2, linear.in_features)
    linear.weight_function = [lambda weight: weight + scale * (up @ down).to(weight)]
    linear.bias_function = [lambda bias: bias + 1]


@pytest.mark.parametrize("storage", FLOATS)
@pytest.mark.parametrize("compute", FLOATS)
@pytest.mark.parametrize("patched", [False, True])
def test_the_fused_op_gives_what_the_modules_give(fused, storage, compute, patched):
    import comfy.ops

    x, one = map_of(compute), casting_block(storage)
    called = casting_block(storage, comfy.ops.manual_cast)
    if patched:
        for block in (one, called):
            add_low_rank(block.conv_out)
            add_low_rank(block.conv_pool, 0.1)
    got = one(x)
    assert fused == [1]
    expected = called(x)
    assert fused == [1] and got.dtype == expected.dtype == compute
    if patched:
        assert not torch.allclose(got, casting_block(storage)(x), atol=0.1)
    # The two add up in another order, which may round a few times more or less.
    error = distance(got, expected.double())
    assert error.worst <= 4 * torch.finfo(compute).eps


@pytest.mark.parametrize("storage", FLOATS)
@pytest.mark.parametrize("patched", [False, True])
def test_what_is_lent_is_what_a_call_casts(storage, patched):
    import comfy.ops
    from comfyui_deltaconv.nodes.host.ops import LendingCast

    block, like = casting_block(storage), map_of(torch.float32)
    linears = (block.conv_out, block.conv_pool)
    if patched:
        add_low_rank(block.conv_pool)
    with LendingCast.lend(linears, like) as lent:
        assert len(lent) == 4
        for index, linear in enumerate(linears):
            weight, bias, _ = comfy.ops.cast_bias_weight(linear, like, offloadable=True)
            assert torch.equal(lent[2 * index], weight) and torch.equal(lent[2 * index + 1], bias)
        # Nothing is copied where the weights serve as they are.
        own = lent[0] is block.conv_out.weight and lent[3] is block.conv_pool.bias
        assert own == (storage == torch.float32 and not patched)


def hook(block):
    block.conv_out.register_forward_hook(lambda module, arguments, output: output + 1)


def pre_hook(block):
    block.conv_pool.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))


def own_forward(block):
    forward = block.conv_out.forward
    block.conv_out.forward = lambda x: 2 * forward(x)


def other_type(block):
    plain = torch.nn.Linear(16, 16)
    plain.load_state_dict(block.conv_pool.state_dict())
    block.conv_pool = plain


def no_bias(block):
    block.conv_pool.bias = None


def first_hook(block):
    block.conv_up.register_forward_hook(lambda module, arguments, output: output + 1)


CHANGES = [hook, pre_hook, own_forward, other_type, no_bias, first_hook]


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_does_more_is_made(fused, change):
    import comfy.ops

    x, block = map_of(torch.float32), casting_block(torch.float32)
    called = casting_block(torch.float32, comfy.ops.manual_cast)
    before = block(x)
    assert fused == [1]
    for each in (block, called):
        change(each)
    got = block(x)
    assert fused == [1]
    assert torch.equal(got, called(x))
    assert change is other_type or not torch.allclose(got, before)


def test_weights_are_given_back_whatever_happens(monkeypatch):
    import comfy.ops
    from comfyui_deltaconv.nodes.host.ops import LendingCast

    block, given_back = casting_block(torch.float16), []
    real = comfy.ops.uncast_bias_weight

    def noted(linear, *cast):
        given_back.append(linear)
        return real(linear, *cast)

    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", noted)
    linears = (block.conv_out, block.conv_pool)
    with pytest.raises(ZeroDivisionError), LendingCast.lend(linears, map_of(torch.float32)):
        assert not given_back
        raise ZeroDivisionError
    assert given_back == list(linears)
    given_back.clear()

    def fails(weight):
        raise ZeroDivisionError

    block.conv_pool.weight_function = [fails]
    with pytest.raises(ZeroDivisionError):
        block(map_of(torch.float32))
    # What had been lent when the last could not be.
    assert given_back == [block.conv_up, block.conv_out]


def test_apply_reaches_the_fused_op_in_every_layer(fused):
    import comfy.sample
    from comfyui_deltaconv.nodes.apply import DeltaConvApply
    from comfyui_deltaconv.nodes.host.demo_model import load_demo_model

    weights = read_weights(demo.DELTACONV_PATH)
    model, _ = DeltaConvApply.execute(load_demo_model(), weights).args
    positive = [[demo.text_encoder().encode("red apple"), {}]]
    latent = torch.zeros(1, 3, 16, 16)
    noise = comfy.sample.prepare_noise(latent, 1)
    arguments = (noise, 2, 1.0, "euler", "normal", positive, positive, latent)
    assert comfy.sample.sample(model, *arguments, seed=1).isfinite().all()
    assert len(fused) == 2 * len(weights.sites)


@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_a_compiler_sees_one_graph(storage):
    x, block = map_of(torch.float32), casting_block(storage)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
