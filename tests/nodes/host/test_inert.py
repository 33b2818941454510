"""What core's own nodes do to replaced layers without effect, or in the blocks' way."""

import logging
from pathlib import Path

import patched_models as models
import pytest
import torch
from safetensors.torch import save_file

apply = models.apply

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

INERT = "on replaced self-attention layers have no effect where blocks run"
MIDDLE = "middle_block.1.transformer_blocks.0.attn1"


def sample(model, **inputs):
    return models.sample(model, (8, 8), **inputs)


def first(result):
    """The first output of a node of either kind."""
    return (result.args if hasattr(result, "args") else result)[0]


@pytest.fixture
def lora_name(base):
    """A LoRA file on attn1's projections, where ComfyUI's loaders look for it."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(models.lora_state(base, ".attn1.to_"), folder / "attn1.safetensors")
    yield "attn1.safetensors"
    (folder / "attn1.safetensors").unlink()


def lora_model_only(model, lora_name):
    from nodes import LoraLoaderModelOnly

    return LoraLoaderModelOnly().load_lora_model_only(model, lora_name, 1.0)[0]


def bypass(model, lora_name):
    from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly

    return LoraLoaderBypassModelOnly().load_lora_model_only(model, lora_name, 1.0)[0]


def merge(model, _):
    from comfy_extras.nodes_model_merging import ModelMergeSimple
    from comfyui_deltaconv.nodes.host.demo_model import load_demo_model

    return ModelMergeSimple().merge(model, load_demo_model(), 0.5)[0]


def merge_blocks(model, _):
    from comfy_extras.nodes_model_merging import ModelMergeBlocks
    from comfyui_deltaconv.nodes.host.demo_model import load_demo_model

    return ModelMergeBlocks().merge(model, load_demo_model(), input=1.0, middle=0.5, out=1.0)[0]


def multiply(model, _):
    from comfy_extras.nodes_attention_multiply import UNetSelfAttentionMultiply

    return first(UNetSelfAttentionMultiply.execute(model, 1.5, 1.0, 1.0, 1.0))


def difference(model, _):
    clone = model.clone()
    name = f"diffusion_model.{MIDDLE}.to_q.weight"
    weight = clone.get_model_object(name)
    clone.add_patches({name: ("diff", (torch.ones_like(weight),))})
    return clone


def exchanged(model, _):
    clone = model.clone()
    name = f"diffusion_model.{MIDDLE}.to_q"
    part = clone.get_model_object(name)
    clone.add_object_patch(name, torch.nn.Linear(part.in_features, part.out_features, bias=False))
    return clone


# The demo's attn1 has 5 tensors in each of 10 layers: q, k, v, and out with its bias.
CASES = [
    (lora_model_only, f"40 LoRA patches {INERT}"),
    (bypass, f"40 LoRA patches of LoraLoaderBypass {INERT}"),
    (merge, f"50 patches of a model merge {INERT}"),
    (merge_blocks, f"50 patches of a model merge {INERT}"),
    (multiply, f"50 multiplications of weights {INERT}"),
    (difference, f"1 weight patches {INERT}"),
    (exchanged, f"1 object patches of another node {INERT}"),
]


@pytest.mark.parametrize(
    ("node", "sentence"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_node_is_named_by_what_it_does(base, weights, lora_name, caplog, node, sentence):
    """In the report where it came before, in the log where it came after, in true words."""
    patched, plain = apply(base, weights)
    assert INERT not in plain
    _, report = apply(node(base, lora_name), weights)
    assert [line for line in report.splitlines() if INERT in line] == [
        f"- {sentence}; what lies on other layers works"
    ]
    if node not in (merge, merge_blocks):
        after = node(patched, lora_name)
        student = sample(patched)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(sample(after), student)
            sample(after)
        said = [r.getMessage() for r in caplog.records if INERT in r.getMessage()]
        assert len(said) == 1
        assert sentence in said[0]


def test_every_kind_is_told_apart(base, weights, lora_name):
    model = multiply(merge(bypass(lora_model_only(base, lora_name), lora_name), None), None)
    _, report = apply(model, weights)
    for sentence in (CASES[0][1], CASES[1][1], CASES[2][1], CASES[4][1]):
        assert report.count(sentence) == 1


def test_a_lora_by_hook_is_said_at_sampling(base, weights, lora_name, caplog):
    from comfy_extras.nodes_hooks import CreateHookLoraModelOnly, SetModelHooksOnCond

    (hooks,) = CreateHookLoraModelOnly().create_hook_model_only(lora_name, 1.0)
    condition = models.condition("red apple")
    (hooked,) = SetModelHooksOnCond().attach_hook(condition, hooks)
    # Without guidance: ComfyUI runs a hooked prompt in a batch of its own.
    patched, report = apply(base, weights)
    assert INERT not in report
    plain = models.sample_with(patched, condition, (8, 8), cfg=1.0)
    stock = models.sample_with(base, condition, (8, 8), cfg=1.0)
    assert not torch.equal(models.sample_with(base, hooked, (8, 8), cfg=1.0), stock)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(models.sample_with(patched, hooked, (8, 8), cfg=1.0), plain)
        models.sample_with(patched, hooked, (8, 8), cfg=1.0)
    said = [r.getMessage() for r in caplog.records if INERT in r.getMessage()]
    assert len(said) == 1
    assert f"40 LoRA patches of hooks {INERT}" in said[0]


def same(q, k, v, options):
    """An attn1 replace patch as other nodes write them."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(q, k, v, options["n_heads"])


def replaced_in(model, blocks):
    clone = model.clone()
    for block in blocks:
        clone.set_model_attn1_replace(same, *block)
    return clone


def calls(model):
    """Block calls of this MODEL from now on."""
    (blocks,) = model.get_additional_models_with_key("deltaconv")
    met = []
    for site, block in zip(blocks.model.sites, blocks.model.blocks, strict=True):
        block.register_forward_hook(lambda *_, site=site: met.append(site))
    return met


EVERYWHERE = [(kind, number) for kind in ("input", "middle", "output") for number in range(12)]


@pytest.mark.parametrize(
    ("blocks", "count"), [(EVERYWHERE, 10), ([("middle", 0)], 1), ([("middle", 0, 0)], 1)]
)
@pytest.mark.parametrize("first", [True, False])
def test_an_attn1_replace_patch_is_said(base, weights, caplog, blocks, count, first):
    if first:
        model, report = apply(replaced_in(base, blocks), weights)
        assert f"in {count} of the 10 replaced self-attention layers another node" in report
    else:
        patched, report = apply(base, weights)
        assert "attn1 replace" not in report
        model = replaced_in(patched, blocks)
    met = calls(model)
    with caplog.at_level(logging.WARNING):
        sample(model)
        sample(model)
    # What is said is what happens.
    assert len(set(met)) == 10 - count
    said = [r.getMessage() for r in caplog.records if "attn1 replace" in r.getMessage()]
    assert len(said) == 1
    assert f"in {count} of the 10 replaced" in said[0]


def test_an_attn1_replace_patch_elsewhere_is_not_said(base, weights, caplog):
    patched, report = apply(base, weights, sites="middle")
    model = replaced_in(patched, [("input", number) for number in range(12)])
    with caplog.at_level(logging.WARNING):
        sample(model)
    assert "attn1 replace" not in report + caplog.text
    clone = patched.clone()
    clone.set_model_attn2_replace(same, "middle", 0)
    _, report = apply(clone, weights)
    assert "attn1 replace" not in report


@pytest.mark.parametrize("scope", ["AllConditioning", "HookedOnly"])
def test_an_attn1_replace_patch_by_hook_is_said(base, weights, caplog, scope):
    import comfy.hooks

    options = {"patches_replace": {"attn1": {("middle", 0): same}}}
    group = comfy.hooks.HookGroup()
    group.add(
        comfy.hooks.TransformerOptionsHook(options, hook_scope=comfy.hooks.EnumHookScope[scope])
    )
    hooked = comfy.hooks.set_hooks_for_conditioning(models.condition("red apple"), group)
    patched, _ = apply(base, weights)
    with caplog.at_level(logging.WARNING):
        models.sample_with(patched, hooked, (8, 8))
    assert "in 1 of the 10 replaced self-attention layers another node" in caplog.text
