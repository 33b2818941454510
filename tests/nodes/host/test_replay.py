"""Replayed model calls: what is recorded, when it is used, when it is not.

Without a GPU a recording is the call itself on the inputs that it was recorded with: a wrong kind,
an input that is not copied or an output that is not taken shows as a wrong picture.
"""

import logging

import pytest
import torch
from patched_models import apply, condition, lora, pixart_weights, sample, sample_pixart
from torch.utils._pytree import tree_map

__all__ = ["pixart_weights"]  # a fixture

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes", "one_thread")

HAS_GPU = torch.cuda.is_available()
# What ComfyUI's versions can change is in the others.
once = pytest.mark.any_comfyui


class Recorder:
    """Records calls; a replay makes the call again into the tensors of the first time."""

    def __init__(self):
        self.recorded = self.replayed = 0
        self.problem = ""

    def __call__(self, call):
        if self.problem:
            raise RuntimeError(self.problem)
        output = call()
        self.recorded += 1

        def replay():
            self.replayed += 1
            tree_map(lambda kept, new: kept.copy_(new), output, call())

        return replay, output


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def replaying(recorder, comfy):
    """A function that gives a MODEL replays that the recorder makes."""
    from comfyui_deltaconv.nodes.host.replay import Replays, attach_replays

    return lambda model: attach_replays(model, Replays(recorder, "cpu"))


def test_pictures_keep_their_bits(base, weights, recorder, replaying):
    patched, _ = apply(base, weights)
    for model in (base, patched):
        recorder.recorded = recorder.replayed = 0
        assert torch.equal(sample(replaying(model), steps=4), sample(model, steps=4))
        # One call per step, both prompts in one batch: met, recorded and replayed, replayed, …
        assert (recorder.recorded, recorder.replayed) == (1, 3)


@once
def test_the_model_beneath_is_replayed_after_blocks_were_on_it(base, weights, recorder, replaying):
    """ComfyUI puts the forwards that it restores on the modules themselves."""
    sample(apply(base, weights)[0])
    expected = sample(base, steps=4)
    assert any("forward" in vars(module) for module in base.model.diffusion_model.modules())
    assert torch.equal(sample(replaying(base), steps=4), expected)
    assert recorder.replayed == 3


@once
def test_order_with_apply_does_not_matter(base, weights, recorder, replaying):
    expected = sample(apply(base, weights)[0], steps=3)
    assert torch.equal(sample(apply(replaying(base), weights)[0], steps=3), expected)
    assert recorder.replayed == 2


@once
def test_steps_with_and_without_blocks_are_recorded_apart(base, weights, recorder, replaying):
    patched, _ = apply(base, weights, start_percent=0.3, end_percent=0.8)
    assert torch.equal(sample(replaying(patched), steps=9), sample(patched, steps=9))
    assert recorder.recorded == 2 and recorder.replayed >= 5


def test_pixart_is_replayed(pixart, pixart_weights, recorder, replaying):
    patched, _ = apply(pixart, pixart_weights)
    assert torch.equal(sample_pixart(replaying(patched), steps=3), sample_pixart(patched, steps=3))
    assert recorder.replayed == 2


@once
def test_every_size_is_recorded_for_itself(base, recorder, replaying):
    model = replaying(base)
    for size in ((16, 16), (24, 16)):
        assert torch.equal(sample(model, size, steps=3), sample(base, size, steps=3))
    assert recorder.recorded == 2


@once
def test_nothing_is_kept_after_sampling(base, recorder):
    import gc
    import weakref

    kept = []

    def record(call):
        replay, output = recorder(call)
        kept.append(weakref.ref(output))
        return replay, output

    from comfyui_deltaconv.nodes.host.replay import Replays, attach_replays

    sample(attach_replays(base, Replays(record, "cpu")), steps=3)
    gc.collect()
    assert kept and all(reference() is None for reference in kept)


@once
def test_a_merged_lora_is_in_the_recording(base, recorder, replaying):
    changed = lora(base, "attn2")(base)
    assert torch.equal(sample(replaying(changed), steps=3), sample(changed, steps=3))
    assert recorder.replayed == 2


def said(caplog):
    return [record.getMessage() for record in caplog.records if "model calls" in record.message]


def another_wrapper(model):
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    clone.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "z", lambda executor, *a, **b: executor(*a, **b)
    )
    return clone


def object_patch(model):
    clone = model.clone()
    key = "diffusion_model.out.forward"
    original = clone.get_model_object(key)
    clone.add_object_patch(key, lambda x: original(x))
    return clone


@once
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_wrapper, "another node wraps"),
        (object_patch, "another node replaced the forward of out"),
    ],
)
def test_what_other_nodes_decide_is_not_recorded(base, recorder, replaying, caplog, change, reason):
    caplog.set_level(logging.INFO)
    expected = sample(change(base), steps=2)
    assert torch.equal(sample(change(replaying(base)), steps=2), expected)
    assert recorder.recorded == 0
    (sentence,) = said(caplog)
    assert "0 of 2 model calls were replayed" in sentence and reason in sentence


@once
def test_patches_of_other_nodes_are_not_recorded(base, recorder, replaying, caplog):
    caplog.set_level(logging.INFO)
    model = base.clone()
    seen = []

    def patch(h, hsp, options):
        seen.append(float(options["sigmas"][0]))
        return h * (1 + 0.1 * len(seen)), hsp

    model.set_model_output_block_patch(patch)
    first = sample(model, steps=3)
    seen.clear()
    assert torch.equal(sample(replaying(model), steps=3), first)
    assert recorder.recorded == 0 and "another node's patches" in said(caplog)[0]


@once
def test_weights_that_move_are_recorded_anew(base, recorder, replaying):
    """Hooks can exchange weights between steps; addresses are compared in every call."""
    from comfy.patcher_extension import WrappersMP

    model = replaying(base)
    layer = base.model.diffusion_model.out[2]
    before = [layer.weight.data]

    def moving(executor, *arguments, **named):
        layer.weight.data = layer.weight.data.clone()
        # Kept, so that no later one lies in its place.
        before.append(layer.weight.data)
        return executor(*arguments, **named)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "moving", moving)
    try:
        got = sample(model, steps=6)
    finally:
        layer.weight.data = before[0]
    assert recorder.replayed == 0
    assert torch.equal(got, sample(base, steps=6))


@once
def test_what_cannot_be_recorded_runs_as_usual(base, recorder, replaying, caplog):
    caplog.set_level(logging.INFO)
    recorder.problem = "operation not permitted when stream is capturing\nmore"
    assert torch.equal(sample(replaying(base), steps=4), sample(base, steps=4))
    (sentence,) = said(caplog)
    assert "0 of 4" in sentence and "operation not permitted when stream is capturing)" in sentence


@once
def test_the_node_on_a_computer_without_cuda(base, caplog):
    if HAS_GPU:
        pytest.skip("this computer has one")
    from comfyui_deltaconv.nodes.cuda_graph import DeltaConvCudaGraph

    caplog.set_level(logging.INFO)
    (model,) = DeltaConvCudaGraph.execute(base).args
    assert torch.equal(sample(model), sample(base))
    assert "0 of 2 model calls were replayed" in said(caplog)[0]
    assert "runs on cpu, where there are no CUDA graphs" in said(caplog)[0]


@once
def test_a_call_outside_of_sampling_is_not_recorded(base, recorder, replaying):
    model = replaying(base)
    options = model.model_options["transformer_options"]
    x, times = torch.randn(1, 3, 16, 16), torch.ones(1)
    context = condition("red apple")[0][0]
    for _ in range(3):
        model.model.diffusion_model(x, times, context=context, transformer_options=dict(options))
    assert recorder.recorded == 0
