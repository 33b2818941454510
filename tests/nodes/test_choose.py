"""Choose ΔConv Layers in the real ComfyUI, on the real demo model."""

import time

import pytest
import torch
from comfyui_deltaconv.deltaconv import read_weights, write_weights
from comfyui_deltaconv.deltaconv.distillation.choice import SiteCost
from comfyui_deltaconv.deltaconv.locality.recipe import parse_recipe
from patched_models import apply, condition, sample

pytestmark = pytest.mark.usefixtures("one_thread", "as_comfyui_runs_nodes")

LATENT = {"samples": torch.zeros(1, 4, 16, 16)}
HIGH = "output_blocks.4.1.transformer_blocks.0.attn1"


def run(model, weights, **inputs):
    """(deltaconv, recipe, curve, report) of the node itself, at a small size."""
    from comfyui_deltaconv.nodes.choose import DeltaConvChoose

    defaults = {
        "positive": condition("red apple"),
        "negative": condition(""),
        "latent": LATENT,
        "steps": 2,
    }
    return DeltaConvChoose.execute(model, weights, **{**defaults, **inputs}).args


@pytest.fixture
def costs(monkeypatch, weights):
    """Costs by layer that no clock gave: the wider the map, the more the block saves."""
    from comfyui_deltaconv.nodes.host import choose

    made = {site: SiteCost(1 + (g.dim == 64), 0.5) for site, g in weights.sites.items()}
    monkeypatch.setattr(choose, "site_costs", lambda *_: (made, "as the test says"))
    return made


def test_node_chooses_layers_and_a_start_that_apply_takes(model, weights, costs, tmp_path):
    chosen, recipe, curve, report = run(model, weights)
    assert 0 < len(chosen.sites) <= len(weights.sites) and set(chosen.sites) <= set(weights.sites)
    assert curve.ndim == 4 and curve.shape[-1] == 3 and 0 <= curve.min() <= curve.max() <= 1
    assert report.startswith(
        f"- balanced: blocks in {len(chosen.sites)} of 10 self-attention layers"
    )
    assert "as the test says" in report and "no pictures" not in report
    assert all(f"{site}: " in report for site in weights.sites)
    again = parse_recipe(recipe.to_text(), list(weights.sites))
    assert (set(again.replaced), again.start) == (set(chosen.sites), chosen.start)
    for site, plan in again.replaced.items():
        assert (plan.kernel, plan.scales) == (weights.sites[site].kernel_size, weights.scales[site])
    read = read_weights(write_weights(chosen, tmp_path / "chosen.safetensors"))
    assert (set(read.sites), read.start) == (set(chosen.sites), chosen.start)
    patched, _ = apply(model, chosen)
    assert not torch.equal(sample(patched, (16, 16)), sample(model, (16, 16)))


@pytest.mark.any_comfyui
def test_presets_differ_as_they_say(model, weights, costs):
    everything = run(model, weights, preset="fastest")
    assert everything[0].sites == weights.sites and everything[0].start == 0
    assert "attention stays in: no layer" in everything[3]
    total = sum(cost.saved for cost in costs.values())
    for preset, share, least in (("faithful", 0.6, 0.3), ("own share", 0.8, 0.8)):
        chosen, _, _, report = run(model, weights, preset=preset, time_saved=share)
        saved = sum(costs[site].saved for site in chosen.sites) * (1 - chosen.start) / total
        assert saved >= least - 1e-9
        assert report.startswith(f"- {preset}: blocks in ")
        assert all(name in report for name in ("balanced", "faithful", "fastest"))


def test_costs_are_measured_on_this_device(model, weights):
    from comfyui_deltaconv.nodes.host.choose import site_costs

    costs, counted = site_costs(model, weights, (32, 32), 2)
    assert costs.keys() == weights.sites.keys()
    assert all(cost.timed and 0 < cost.block < 10 > cost.attention > 0 for cost in costs.values())
    # ComfyUI's attention takes fifteen times as long as the block here.
    assert costs[HIGH].saved > 0
    assert counted == "timed on CPU at 32 × 32 latent cells, float32, batch 2"
    # Layers that are alike are timed once.
    assert costs[HIGH] == costs[HIGH.replace("4", "5")]


@pytest.mark.any_comfyui
def test_the_first_call_of_attention_does_not_count():
    from comfyui_deltaconv.nodes.host.choose import _cost

    first = iter([0.5])
    cost = _cost(
        lambda: time.sleep(0.001),
        lambda: time.sleep(next(first, 0.02)),
        torch.device("cpu"),
        2.0,
    )
    assert cost.attention < 0.2


@pytest.mark.any_comfyui
def test_costs_are_counted_where_a_layer_cannot_be_timed(model, weights, monkeypatch):
    from comfyui_deltaconv.nodes.host import choose

    def too_large(*_):
        return SiteCost(float("inf"), 1.0)

    monkeypatch.setattr(choose, "_cost", too_large)
    costs, counted = choose.site_costs(model, weights, (64, 32), 2)
    assert "by formula at 32 × 64 latent cells, as a layer alone ran out of memory" in counted
    assert not any(cost.timed for cost in costs.values())
    assert "GFLOP per step" in run(model, weights)[3]


def test_the_model_is_left_as_it_was(model, weights):
    import comfy.model_management

    before = sample(model, (16, 16))
    patches = dict(model.object_patches), set(model.additional_models)
    run(model, weights, negative=None, latent={"samples": torch.zeros(1, 4, 32, 32)}, steps=1)
    assert (dict(model.object_patches), set(model.additional_models)) == patches
    assert torch.equal(sample(model, (16, 16)), before)
    assert not comfy.model_management.in_training


@pytest.mark.any_comfyui
def test_latents_without_a_decoder_have_no_pictures(costs, model, weights, monkeypatch):
    from comfyui_deltaconv.nodes import choose

    with_pictures = run(model, weights)[2]
    monkeypatch.setattr(choose, "_decoder", lambda vae: lambda latents: None)
    _, _, curve, report = run(model, weights)
    assert report.endswith("No pictures: connect a VAE that decodes this model's latents.")
    assert curve.shape[1] < with_pictures.shape[1]


class Vae:
    """Decodes latents [B, 3, H, W] to gray pictures, and keeps how often."""

    def __init__(self):
        self.batches = []

    def decode(self, latents):
        self.batches.append(len(latents))
        return torch.full((len(latents), *latents.shape[2:], 3), 0.5)


@pytest.mark.any_comfyui
def test_every_prompt_is_measured_and_the_first_are_shown(costs, model, weights):
    vae = Vae()
    prompts = [*condition("red apple"), *condition("octopus"), *condition("purple heart")]
    report = run(model, weights, positive=prompts, vae=vae, steps=1)[3]
    assert "3 prompts, 1 step, CFG 4, seed 0" in report
    assert vae.batches and set(vae.batches) == {2}


@pytest.mark.any_comfyui
def test_weights_that_act_late_stay_late(costs, model, weights):
    late = weights.only(weights.sites, 0.5)
    chosen, recipe, _, report = run(model, late, preset="faithful")
    assert chosen.start == recipe.start == 0.5
    assert "from 50% of sampling on" in report and "balanced" not in report
    with pytest.raises(ValueError, match="save 60% of the time, got at most 50%"):
        run(model, late)


@pytest.mark.any_comfyui
@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"positive": []}, "Expected conditioning in positive, got an empty one"),
        ({"negative": []}, "Expected conditioning in negative, got an empty one"),
        ({"preset": "own share", "time_saved": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"preset": "own share", "time_saved": 0.0}, "above 0 and at most 1, got 0"),
        ({"preset": "best"}, "Expected one of balanced, fastest, faithful, got 'best'"),
    ],
)
def test_bad_inputs_are_refused_before_anything_runs(model, weights, inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(model, weights, **inputs)


@pytest.mark.any_comfyui
def test_weights_of_another_model_are_refused(pixart, weights):
    with pytest.raises(ValueError, match="Expected"):
        run(pixart, weights)


@pytest.mark.any_comfyui
def test_an_interrupt_ends_it_and_leaves_nothing(costs, model, weights):
    import comfy.model_management
    import comfy.utils

    shown = []

    def hook(value, total, preview, node_id=None, **_):
        shown.append(value / total)
        if len(shown) == 6:
            comfy.model_management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(model, weights)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    assert shown == sorted(shown) and 0 < shown[-1] < 1
    assert not comfy.model_management.in_training
    run(model, weights, steps=1)
