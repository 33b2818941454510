"""Anima and Cosmos-Predict2 in the real ComfyUI: small models of its own classes."""

import logging
import re

import patched_models as models
import pytest
import torch
from anima_model import DEPTH, DIM, TEXT, build
from comfyui_deltaconv.deltaconv import DeltaConvBlock
from comfyui_deltaconv.deltaconv.families import FAMILIES
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks

SITES = [f"blocks.{index}.self_attn" for index in range(DEPTH)]

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")


# Both are one class but for Anima's text modules: one of them runs on both versions of ComfyUI.
@pytest.fixture(params=["Anima", pytest.param("CosmosT2IPredict2", marks=pytest.mark.any_comfyui)])
def model(request, comfy):
    return build(request.param)


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return weights_of_blocks({site: DeltaConvBlock(DIM, 5) for site in SITES})


def sample(model, size=(13, 18), frames=1, steps=2):
    """A latent [1, 16, T, h, w]; odd sizes are padded to whole tokens inside the model."""
    import comfy.sample

    torch.manual_seed(2)
    condition = [[torch.randn(1, 8, TEXT), {}]]
    latent = torch.zeros(1, 16, frames, *size)
    noise = comfy.sample.prepare_noise(latent, 1)
    return comfy.sample.sample(
        model, noise, steps, 3.0, "euler", "simple", condition, condition, latent, seed=1
    )


def test_sites_are_the_image_blocks_alone(model):
    from comfyui_deltaconv.nodes.host.sites import find_sites

    found = find_sites(model)
    assert found.dims == dict.fromkeys(SITES, DIM)
    attention = model.model.diffusion_model.blocks[0].self_attn
    assert found.sites[SITES[0]].parameters == sum(p.numel() for p in attention.parameters())
    assert found.map_size(SITES[0], 13, 18) == (7, 9)
    assert found.text_shape(model.model.diffusion_model) == (512, TEXT)
    assert all(found.levels[site] == 0 for site in SITES)
    modules = dict(model.model.diffusion_model.named_modules())
    assert all(found.after_residual(site) in modules for site in found.sites.values())
    assert set(found.recomputable(model.model.diffusion_model)) <= set(modules)


@pytest.mark.any_comfyui
@pytest.mark.parametrize(
    ("kind", "family", "size"),
    [
        ("Anima", "anima", {"model_channels": 2048, "num_blocks": 28, "num_heads": 16}),
        (
            "CosmosT2IPredict2",
            "cosmos-predict2",
            {"model_channels": 2048, "num_blocks": 28, "num_heads": 16},
        ),
        (
            "CosmosT2IPredict2",
            "cosmos-predict2-14b",
            {"model_channels": 5120, "num_blocks": 36, "num_heads": 40},
        ),
    ],
)
def test_families_are_the_rows_that_real_sizes_have(kind, family, size):
    from comfyui_deltaconv.nodes.host.sites import find_sites

    found = find_sites(build(kind, device="meta", **size, crossattn_emb_channels=1024))
    assert found.family == family
    assert found.dims == dict(FAMILIES[family].dims)


def test_blocks_take_attentions_place_and_leave_without_a_trace(model, weights):
    stock = sample(model)
    patched, report = models.apply(model, weights)
    student = sample(patched)
    assert not torch.allclose(stock, student, atol=1e-2)
    assert "3 of 3" in report
    for _ in range(2):
        assert torch.equal(sample(model), stock)
        assert torch.equal(sample(patched), student)
    assert torch.equal(sample(model), stock)
    assert not any("deltaconv" in key for key in model.object_patches)


def test_a_block_computes_the_padded_map(model, weights):
    """By hand: the module's own forward exchanged for the block on rows × columns."""
    patched, _ = models.apply(model, weights)
    student = sample(patched)
    blocks = {site: weights.block(site) for site in SITES}
    by_hand, maps = model.clone(), set()
    for site, block in blocks.items():

        def forward(x, context=None, rope_emb=None, transformer_options=None, block=block):
            maps.add(tuple(x.shape[1:]))
            return block(x.unflatten(1, (7, 9))).flatten(1, 2)

        by_hand.add_object_patch(f"diffusion_model.{site}.forward", forward)
    expected = sample(by_hand)
    assert maps == {(63, DIM)}
    assert (student - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_video_runs_plain_attention_and_says_so_once(model, weights, caplog):
    stock = sample(model, frames=3)
    patched, _ = models.apply(model, weights)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(patched, frames=3), stock)
    said = [record.getMessage() for record in caplog.records if "whole map" in record.getMessage()]
    assert len(said) == 1 and "got a video of 3 frames. Plain attention runs" in said[0]
    assert "HyperTile" not in said[0]


def test_percent_range_and_sites(model, weights):
    stock, student = (sample(m, steps=4) for m in (model, models.apply(model, weights)[0]))
    late, _ = models.apply(model, weights, start_percent=0.4)
    one, report = models.apply(model, weights, sites="blocks.1.self_attn")
    assert "1 of 3" in report
    for got in (sample(late, steps=4), sample(one, steps=4)):
        assert not torch.equal(got, stock) and not torch.equal(got, student)


def test_layers_are_timed_alone_at_the_size_of_a_latent(model, weights):
    from comfy.patcher_extension import CallbacksMP

    latent = {"samples": torch.zeros(1, 16, 1, 13, 18)}
    patched, report = models.apply(model, weights, latent=latent, when="where faster")
    assert re.search(r"blocks run in \d of 3 layers and shapes at batch 2", report)
    (call, *_) = patched.get_all_callbacks(CallbacksMP.ON_CLEANUP)
    application = call.__self__
    timed = dict.fromkeys((site, (2, 7, 9)) for site in SITES).keys()
    assert application.chosen.keys() == timed
    # Sampling with guidance meets these shapes and no other.
    sample(patched)
    assert application.chosen.keys() == timed


def test_attention_is_seen_as_it_acts(model):
    """q and k behind their norms and rotary positions: the product is what attention computes."""
    import comfy.utils
    from comfyui_deltaconv.nodes.host.patch import detach
    from comfyui_deltaconv.nodes.host.sites import find_sites

    found, clone, seen = find_sites(model), detach(model), []
    found.prepare(clone, "test")
    site = found.sites[SITES[1]]
    module = comfy.utils.get_attr(clone.model, f"diffusion_model.{site.path}")

    def inspect(heads):
        q, k, v, size, scale, problem = heads
        assert (size, problem) == ((7, 9), "") and q.shape == (q.shape[0], 2, 63, DIM // 2)
        seen.append(size)
        scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    forward = found.inspecting(site, module, module.forward, inspect)
    clone.add_object_patch(site.forward_key, forward)
    stock = sample(model)
    assert (sample(clone) - stock).abs().max() <= 1e-4 * stock.abs().max()
    assert seen


def test_distilling_is_refused_before_anything_is_changed(model):
    from comfyui_deltaconv.nodes.host.teacher import ComfyTeacher

    with pytest.raises(ValueError, match=r"latents have frames: distilling .* not built yet"):
        ComfyTeacher(model)
    assert not model.object_patches


@pytest.mark.parametrize("model", ["Anima"], indirect=True)
def test_its_locality_is_measured_and_its_steps_are_timed(model, weights):
    from comfyui_deltaconv.nodes.benchmark import DeltaConvBenchmark
    from comfyui_deltaconv.nodes.locality import DeltaConvLocality

    positive = [[torch.randn(1, 8, TEXT), {}]]
    latent = {"samples": torch.randn(1, 16, 1, 13, 18)}
    report = DeltaConvLocality.execute(model, positive, latent, percents="0.5").args[0]
    assert {path: (site.height, site.width) for path, site in report.sites.items()} == (
        dict.fromkeys(SITES, (7, 9))
    )
    table = DeltaConvBenchmark.execute(model, weights, "96x144", 1, 1, 5.0).args[0]
    assert "blocks by torch in 3 of 3 layers" in table and "out of memory" not in table
