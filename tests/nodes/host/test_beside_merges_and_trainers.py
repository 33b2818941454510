"""What takes a MODEL's weights, trains on it or runs it as a second model: said, and no crash.

The words of most are rows of docs/combinations.md; here is what a row does not hold.
"""

import logging
import weakref

import pytest
import torch
from combinations import FAMILIES, Missing, dual_model_guider, lora_by_patch, sample_by
from outcomes import counted
from own_combinations import loaded_again, lora_training
from patched_models import apply

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes", "one_thread")


@pytest.fixture
def case(comfy):
    return FAMILIES["Wan"]()


@pytest.fixture
def shown(monkeypatch, comfy):
    """(node, text) of all that is shown while the node 7 runs."""
    from comfyui_deltaconv.nodes import apply as node
    from comfyui_deltaconv.nodes.host import application

    texts = []

    def show(text, node="7"):
        texts.append((node, text))

    for module in (application, node):
        monkeypatch.setattr(module, "show_on_node", show)
    monkeypatch.setattr(node, "running_node", lambda: "3")
    return texts


def merged(first, second):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return ModelMergeSimple().merge(first, second, 0.5)[0]


def needs_dual_models():
    from comfy_extras import nodes_custom_sampler

    if not hasattr(nodes_custom_sampler, "DualModelGuider"):
        pytest.skip("this ComfyUI has no Dual Model CFG Guider")


def test_a_lora_is_trained_through_blocks(case, caplog):
    """Blocks loaded in inference mode have no backward pass, which the stock model has."""
    try:
        lora_training(case, caplog)
    except Missing:
        pytest.skip("this ComfyUI trains no LoRA")


def test_a_merge_is_told_on_its_own_node(case, shown, caplog):
    patched, _ = apply(case.model, case.weights)
    for _ in range(2):
        merged(case.model, patched.clone())
    told = [text for node, text in shown if node == "7" and "after the merge" in text]
    assert len(told) == 2 and caplog.text.count("after the merge") == 1
    # As the first model it keeps its blocks, and there is nothing to say.
    shown.clear()
    merged(patched, case.model)
    assert not shown


def test_a_model_without_blocks_again_merges_and_saves_silently(case, shown):
    from comfyui_deltaconv.nodes.host.patch import detach

    patched, _ = apply(case.model, case.weights)
    shown.clear()
    bare = detach(patched)
    merged(case.model, bare)
    assert bare.state_dict_for_saving().keys() == case.model.state_dict_for_saving().keys()
    assert not shown


def test_a_clone_that_is_gone_leaves_nothing(case):
    """What tells of merges must not keep a patcher, and with it the model, alive."""
    patched, _ = apply(case.model, case.weights)
    gone = weakref.ref(patched.clone())
    assert gone() is None


def test_what_sampling_tells_stands_on_apply(case, shown):
    """Below what Apply ΔConv itself says, once, whichever node draws."""
    patched, report = apply(case.model, case.weights)
    ((_, summary),) = shown
    assert summary.splitlines()[0] in report
    for _ in range(2):
        case.sample(lora_by_patch(case, patched))
    assert len(shown) == 2 and shown[1][0] == "3"
    first, sentence = shown[1][1].rsplit("\n", 1)
    assert first == summary and "LoRA patches on replaced self-attention layers" in sentence


def test_a_second_model_heeds_no_range_and_says_so(case, caplog):
    """Its wrapper, which notes the step, is not called: blocks must not act in every step."""
    needs_dual_models()
    other = loaded_again(case)
    expected = sample_by(dual_model_guider(case, other, case.model), case)
    patched, _ = apply(case.model, case.weights, start_percent=0.5)
    calls = counted(patched)
    with caplog.at_level(logging.WARNING):
        result = sample_by(dual_model_guider(case, other, patched), case)
    assert torch.equal(result, expected) and not calls
    assert caplog.text.count("start_percent and end_percent are not heeded") == 1


def test_a_second_model_has_no_map_of_an_earlier_sampling(comfy, caplog):
    """HunyuanDiT's map is noted by a wrapper; one of as many tokens may lie the other way round."""
    needs_dual_models()
    case = FAMILIES["HunyuanDiT"]()
    patched, _ = apply(case.model, case.weights)
    case.sample(patched)
    case.latent = case.latent.transpose(-1, -2).contiguous()
    other, calls = loaded_again(case), counted(patched)
    expected = sample_by(dual_model_guider(case, other, case.model), case)
    assert torch.equal(sample_by(dual_model_guider(case, other, patched), case), expected)
    assert not calls and "tokens of an unknown map, as in the second model" in caplog.text


def test_a_guider_at_cfg_1_has_one_pass(case, caplog):
    needs_dual_models()
    patched, _ = apply(case.model, case.weights)
    guider = dual_model_guider(case, patched, case.model)
    guider.set_cfg(1.0)
    sample_by(guider, case)
    assert "Dual Model" not in caplog.text
