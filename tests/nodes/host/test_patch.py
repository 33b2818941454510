"""How a patched MODEL behaves in the real ComfyUI, on the real demo model and a small PixArt."""

import gc
import logging
import weakref
from dataclasses import replace

import patched_models as models
import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock, WeightsError
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
from safetensors.torch import load_file

apply, lora, sample, sample_pixart = (
    models.apply,
    models.lora,
    models.sample,
    models.sample_pixart,
)
pixart_weights = models.pixart_weights

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")


@pytest.fixture
def other_weights(weights):
    """Weights of the same layout that draw something else."""
    blocks = {site: weights.block(site) for site in weights.sites}
    for block in blocks.values():
        block.conv_out.weight.mul_(0.5)
    return weights_of_blocks(blocks, family=weights.family)


def eps(model, data):
    """The diffusion model's own output for the golden input."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    golden = load_file(data / "demo_forward.safetensors")
    arguments = (golden["x"], golden["timesteps"])
    return model.model.diffusion_model(*arguments, context=golden["context"]), golden


def test_teacher_and_student_meet_the_golden_forward(base, weights, data):
    patched, _ = apply(base, weights)
    for model, name in ((base, "teacher_eps"), (patched, "student_eps"), (base, "teacher_eps")):
        got, golden = eps(model, data)
        assert (got - golden[name]).norm() / golden[name].norm() < 1e-4


def test_ab_alternation_is_bit_for_bit(base, weights):
    alone = sample(base)
    patched, _ = apply(base, weights)
    student = sample(patched)
    assert not torch.allclose(alone, student, atol=1e-2)
    for _ in range(3):
        assert torch.equal(sample(base), alone)
        assert torch.equal(sample(patched), student)
    assert torch.equal(sample(base), alone)


def test_applying_alone_changes_nothing(base, weights):
    before = dict(base.object_patches), dict(base.model_options), set(base.additional_models)
    alone = sample(base)
    apply(base, weights)
    assert (dict(base.object_patches), dict(base.model_options), set(base.additional_models)) == (
        before
    )
    assert torch.equal(sample(base), alone)


def test_unload_and_reload(base, weights):
    import comfy.model_management

    patched, _ = apply(base, weights)
    alone, student = sample(base), sample(patched)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(patched), student)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(base), alone)
    patched.detach()
    assert torch.equal(sample(base), alone)


def test_the_blocks_are_comfyuis_to_manage(base, weights):
    import comfy.model_management

    patched, _ = apply(base, weights)
    (blocks,) = patched.get_additional_models_with_key("deltaconv")
    assert blocks.model_size() == 2 * weights.parameters
    sample(patched)
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert any(blocks.is_clone(model) for model in loaded)


def test_the_blocks_go_with_the_clone(base, weights, caplog):
    """The loaded base still carries the forwards, which must not keep the blocks alive."""
    patched, _ = apply(base, weights)
    sample(patched)
    (blocks,) = patched.get_additional_models_with_key("deltaconv")
    module = weakref.ref(blocks.model)
    del patched, blocks
    gc.collect()
    assert module() is None
    sample(base)
    assert "memory leak" not in caplog.text


@pytest.mark.parametrize("order", ["lora first", "blocks first"])
def test_a_lora_on_attn1_is_inert_and_said_once(base, weights, caplog, order):
    add = lora(base, ".attn1.to_")
    alone = sample(base)
    assert not torch.equal(sample(add(base)), alone)
    patched, plain_report = apply(base, weights)
    student = sample(patched)
    if order == "lora first":
        both, report = apply(add(base), weights)
        assert "40 LoRA patches on replaced self-attention layers have no effect" in report
    else:
        both, report = add(patched), plain_report
        assert "LoRA" not in report
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(both), student)
        assert torch.equal(sample(both), student)
    said = [record for record in caplog.records if "LoRA patches" in record.getMessage()]
    assert len(said) == 1
    assert torch.equal(sample(base), alone)


@pytest.mark.parametrize("part", [".attn2.to_", ".ff."])
def test_a_lora_beside_the_blocks_works(base, weights, caplog, part):
    add = lora(base, part)
    alone, student = sample(base), sample(apply(base, weights)[0])
    with_lora = sample(apply(add(base), weights)[0])
    assert not torch.equal(with_lora, student)
    assert torch.equal(sample(add(apply(base, weights)[0])), with_lora)
    assert "LoRA patches" not in caplog.text
    assert torch.equal(sample(base), alone)


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (13, 22), (4, 4), (1, 9)])
def test_sizes_and_batches_with_guidance(base, weights, size):
    patched, _ = apply(base, weights)
    pair = sample(patched, size, batch=3)
    assert pair.isfinite().all()
    assert pair.shape == (3, 3, *size)
    assert torch.equal(sample(patched, size, batch=3), pair)


def test_the_map_reaches_the_block_with_height_before_width(base, weights):
    patched, _ = apply(base, weights)
    shapes = {}
    (blocks,) = patched.get_additional_models_with_key("deltaconv")
    for site in weights.sites:

        def note(_, arguments, site=site):
            shapes[site] = tuple(arguments[0].shape)

        blocks.model[site].register_forward_pre_hook(note)
    sample(patched, (24, 40))
    from comfyui_deltaconv.nodes.host.sites import find_sites

    found = find_sites(base)
    for site, geometry in weights.sites.items():
        assert shapes[site][1:] == (*found.map_size(site, 24, 40), geometry.dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compute_dtypes(base, weights, dtype):
    reference = sample(apply(base, weights)[0])
    model = base.clone()
    model.set_model_compute_dtype(dtype)
    got = sample(apply(model, weights)[0])
    alone = sample(model)
    # As far from float32 as the stock model is in the same dtype, within a factor.
    budget = max((alone - sample(base)).norm() * 4, 1e-4 * reference.norm())
    assert (got - reference).norm() < budget


@pytest.fixture
def with_tokens(weights):
    """The same blocks with an attention over pooled tokens beside each, from nothing."""
    blocks = {}
    torch.manual_seed(4)
    for site, geometry in weights.sites.items():
        block = DeltaConvBlock(geometry.dim, geometry.kernel_size, heads=2)
        block.load_state_dict(weights.state(site), strict=False)
        block.tokens.scale.weight.data.mul_(3)
        blocks[site] = block
    return weights_of_blocks(blocks, family=weights.family)


def test_pooled_tokens_are_applied_as_they_are_distilled(base, weights, with_tokens):
    """By the diffusion model itself, against a call of every block in place of its attention."""
    from comfyui_deltaconv.nodes.host.sites import find_sites

    patched, report = apply(base, with_tokens)
    assert "pooled tokens in 10" in report
    seen = {}
    (blocks,) = patched.get_additional_models_with_key("deltaconv")
    for site in weights.sites:

        def keep(module, arguments, result, site=site):
            seen[site] = arguments[0].clone(), result.clone()

        blocks.model[site].register_forward_hook(keep)
    student = sample(patched)
    assert len(seen) == len(find_sites(base).sites)
    for site, (x, y) in seen.items():
        block = with_tokens.block(site)
        assert (block(x.float()) - y).abs().max() < 1e-4 * y.abs().max()
    assert not torch.allclose(student, sample(apply(base, weights)[0]), atol=1e-2)
    assert torch.equal(sample(patched), student)


def test_pooled_tokens_compute_in_the_models_dtype(base, with_tokens):
    reference, stock = sample(apply(base, with_tokens)[0]), sample(base)
    model = base.clone()
    model.set_model_compute_dtype(torch.bfloat16)
    got = sample(apply(model, with_tokens)[0])
    budget = max((sample(model) - stock).norm() * 4, 1e-4 * reference.norm())
    assert (got - reference).norm() < budget


@pytest.mark.parametrize("size", [(13, 22), (1, 9)])
def test_pooled_tokens_take_maps_of_any_size(base, with_tokens, size):
    patched, _ = apply(base, with_tokens)
    called = []
    (blocks,) = patched.get_additional_models_with_key("deltaconv")
    for site in with_tokens.sites:
        blocks.model[site].tokens.out.register_forward_hook(
            lambda module, arguments, result, site=site: called.append(site)
        )
    assert sample(patched, size, batch=2).isfinite().all()
    # Twice in each of two steps, or once where both halves of the guidance fit one call.
    assert {called.count(site) for site in with_tokens.sites} <= {2, 4}


def test_comfyui_moves_every_tensor_of_a_block(base, with_tokens):
    """It leaves out parameters of modules that have modules within."""
    patched, _ = apply(base, with_tokens)
    (blocks,) = patched.get_additional_models_with_key("deltaconv")
    parts = [part for entry in blocks._load_list() for part in entry]
    listed = {id(part) for part in parts if isinstance(part, torch.nn.Module)}
    for name, _ in blocks.model.named_parameters():
        assert id(blocks.model.get_submodule(name.rpartition(".")[0])) in listed, name


def test_two_files_on_two_clones(base, weights, other_weights):
    first, second = apply(base, weights)[0], apply(base, other_weights)[0]
    expected = sample(first), sample(second)
    assert not torch.equal(*expected)
    for _ in range(3):
        assert torch.equal(sample(first), expected[0])
        assert torch.equal(sample(second), expected[1])


def test_the_last_application_wins_and_says_so(base, weights, other_weights):
    alone = sample(base)
    only = sample(apply(base, other_weights, sites="level 0")[0])
    first, report = apply(base, weights)
    assert "carried" not in report
    second, report = apply(first, other_weights, sites="level 0")
    assert "carried ΔConvBlocks already; these take their place" in report
    assert torch.equal(sample(second), only)
    assert torch.equal(sample(base), alone)
    assert len(second.get_additional_models_with_key("deltaconv")) == 1


def test_an_application_can_be_taken_off(base, weights):
    from comfyui_deltaconv.nodes.host.patch import detach

    alone = sample(base)
    patched, _ = apply(base, weights, end_percent=0.5)
    sample(patched)
    bare = detach(patched)
    assert torch.equal(sample(bare), alone)
    assert not bare.object_patches and not bare.additional_models
    assert not any(bare.wrappers.get("apply_model", {}).values())


def test_hypertile_falls_back_and_says_so_once(base, weights, caplog):
    from comfy_extras.nodes_hypertile import HyperTile

    def tiled(model):
        result = HyperTile.execute(model, 32, 1, 0, False)
        return (result.args if hasattr(result, "args") else result)[0]

    tiles = sample(tiled(base), (16, 16))
    patched, _ = apply(base, weights, sites="level 0")
    with caplog.at_level(logging.WARNING):
        got = sample(tiled(patched), (16, 16))
    assert torch.equal(got, tiles)
    said = [record for record in caplog.records if "expected the whole map" in record.getMessage()]
    assert len(said) == 1
    everywhere = sample(tiled(apply(base, weights)[0]), (16, 16))
    assert not torch.equal(everywhere, tiles)


def test_guidance_that_replaces_attention_still_works(base, weights):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    def perturbed(model):
        result = PerturbedAttentionGuidance.execute(model, 3.0)
        return (result.args if hasattr(result, "args") else result)[0]

    patched, _ = apply(base, weights)
    assert not torch.equal(sample(perturbed(patched)), sample(patched))


def block_calls(model):
    """Numbers of block calls, one per model call of the sampling that follows."""
    (blocks,) = model.get_additional_models_with_key("deltaconv")
    calls = []
    for block in blocks.model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("start", "end", "acting"), [(0.0, 1.0, 4), (0.0, 0.4, 2), (0.4, 1.0, 2), (0.3, 0.7, 2)]
)
def test_percent_range(base, weights, start, end, acting):
    """Four uniform steps stand at 0, ⅓, ⅔ and 1 of sampling."""
    patched, report = apply(base, weights, start_percent=start, end_percent=end)
    calls = block_calls(patched)
    result = sample(patched, (8, 8), steps=4)
    assert len(calls) == acting * len(weights.sites)
    assert ("plain attention runs outside" in report) == (acting < 4)
    if acting < 4:
        assert not torch.equal(result, sample(base, (8, 8), steps=4))


def test_weights_act_from_their_own_start_or_a_later_one(base, weights):
    late = replace(weights, start=0.4)
    for start, acting in ((0.0, 2), (0.2, 2), (0.7, 1)):
        patched, report = apply(base, late, start_percent=start)
        calls = block_calls(patched)
        sample(patched, (8, 8), steps=4)
        assert len(calls) == acting * len(weights.sites)
        why = "the weights act from 40% of sampling on, as chosen when they were made"
        assert (f"- {why}" in report.splitlines()) == (start < 0.4)
    with pytest.raises(ValueError, match=r"Expected end_percent above 0\.4, from where"):
        apply(base, late, end_percent=0.4)


def test_outside_the_range_the_model_is_stock(base, weights):
    patched, _ = apply(base, weights, start_percent=0.4, end_percent=0.6)
    assert torch.equal(sample(patched, steps=4), sample(base, steps=4))


def test_an_empty_range_is_refused(base, weights):
    with pytest.raises(ValueError, match="would never act"):
        apply(base, weights, start_percent=0.5, end_percent=0.5)


def test_a_clone_over_another_model_object_is_bound_to_it(base, weights):
    from comfyui_deltaconv.nodes.host.demo_model import load_demo_model

    patched, _ = apply(base, weights, sites="level 0")
    expected = sample(patched)
    fresh = load_demo_model()
    clone = patched.clone(model_override=fresh.get_clone_model_override())
    assert torch.equal(sample(clone), expected)
    modules = set(fresh.model.modules())
    for forward in clone.object_patches.values():
        assert forward.deltaconv.original.__self__ in modules
        assert forward.deltaconv.model() is fresh.model
    assert torch.equal(sample(patched), expected)


def test_another_nodes_object_patch_is_kept_beneath(base, weights):
    site = "middle_block.1.transformer_blocks.0.attn1"
    key = f"diffusion_model.{site}.forward"
    model, calls = base.clone(), []
    own = model.get_model_object(key)

    def foreign(*arguments, **options):
        calls.append(1)
        return own(*arguments, **options)

    model.add_object_patch(key, foreign)
    patched, _ = apply(model, weights, end_percent=0.4)
    sample(patched, (8, 8), steps=4)
    assert len(calls) == 2
    from comfyui_deltaconv.nodes.host.patch import detach

    assert detach(patched).object_patches == {key: foreign}


def test_a_refusal_leaves_the_model_alone(base, weights):
    before = dict(base.object_patches)
    site = next(iter(weights.sites))
    state = weights.state(site)
    state["conv_up.bias"][0] = torch.nan
    cases = [
        (replace(weights, family="sdxl"), {}, "for Stable Diffusion XL"),
        (replace(weights, tensors={**weights.tensors, site: state}), {}, "NaN"),
        (weights, {"sites": "level 9"}, "names none"),
    ]
    for broken, inputs, sentence in cases:
        with pytest.raises((WeightsError, ValueError), match=sentence):
            apply(base, broken, **inputs)
    assert base.object_patches == before
    partial = replace(weights, sites={site: weights.sites[site]})
    with pytest.raises(ValueError, match="none of these"):
        apply(base, partial, sites="middle")


def test_the_report(base, weights):
    _, report = apply(base, weights, latent={"samples": torch.zeros(1, 3, 128, 96)})
    for words in (
        "10 of 10 self-attention layers replaced",
        "parameters 509 k → 336 k",
        "96 × 128 latent cells",
        "7 × 7 in 4, 9 × 9 in 3, 11 × 11 in 3",
        "weights made for the ΔConv Demo Model",
    ):
        assert words in report
    _, report = apply(base, weights, sites="up, -level 2", gate="sigmoid")
    assert "4 of 10 self-attention layers replaced; 6 not chosen by sites" in report
    assert "gate sigmoid (the weights say scaled)" in report


def test_the_gate_override_is_used(base, weights):
    assert not torch.equal(
        sample(apply(base, weights, gate="sigmoid")[0]), sample(apply(base, weights)[0])
    )


def test_why_the_replaced_layers_keep_their_weights(base):
    """Taking a layer's weights off the model while a clone runs would cost its siblings LoRAs."""
    add = lora(base, ".attn1.to_")
    assert len(add(base).patches) == 40
    bare = base.clone()
    for name, _ in base.model.named_modules():
        if name.endswith(".attn1.to_q"):
            bare.add_object_patch(name, torch.nn.Identity())
    bare.patch_model(torch.device("cpu"))
    # The sibling reads the model as it stands now, and loses these patches without a word.
    assert len(add(base).patches) == 30
    bare.unpatch_model(torch.device("cpu"))
    assert len(add(base).patches) == 40


def test_pixart_alternates_bit_for_bit(pixart, pixart_weights):
    alone = sample_pixart(pixart)
    patched, report = apply(pixart, pixart_weights)
    assert "3 of 3 self-attention layers replaced" in report
    student = sample_pixart(patched)
    assert student.isfinite().all()
    assert not torch.equal(alone, student)
    for _ in range(3):
        assert torch.equal(sample_pixart(pixart), alone)
        assert torch.equal(sample_pixart(patched), student)


def test_pixart_blocks_see_the_map_in_patches(pixart, pixart_weights):
    patched, _ = apply(pixart, pixart_weights)
    (blocks,) = patched.get_additional_models_with_key("deltaconv")
    shapes = set()

    def note(_, arguments):
        shapes.add(tuple(arguments[0].shape[1:]))

    blocks.model.blocks[0].register_forward_pre_hook(note)
    sample_pixart(patched, (36, 48))
    assert shapes == {(18, 24, 48)}


@pytest.mark.parametrize(("start", "end", "acting"), [(0.0, 0.4, 2), (0.4, 1.0, 2), (0.0, 1.0, 4)])
def test_pixart_percent_range(pixart, pixart_weights, start, end, acting):
    patched, _ = apply(pixart, pixart_weights, start_percent=start, end_percent=end)
    calls = block_calls(patched)
    sample_pixart(patched, steps=4)
    assert len(calls) == acting * 3


def test_pixart_outside_the_range_is_stock(pixart, pixart_weights):
    patched, _ = apply(pixart, pixart_weights, start_percent=0.4, end_percent=0.6)
    assert torch.equal(sample_pixart(patched, steps=4), sample_pixart(pixart, steps=4))
