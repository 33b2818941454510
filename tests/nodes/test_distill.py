"""Distillation and evaluation nodes in the real ComfyUI, on the real demo model."""

import gc
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui_deltaconv.deltaconv import demo, read_weights
from comfyui_deltaconv.deltaconv.distillation import (
    Dataset,
    DistillationSettings,
    StageSettings,
    distill,
)
from comfyui_deltaconv.deltaconv.distillation.checkpoint import state_files
from comfyui_deltaconv.deltaconv.distillation.evaluation import held_out_error
from comfyui_deltaconv.deltaconv.geometry import BlockPlan
from comfyui_deltaconv.deltaconv.locality.recipe import Recipe
from distill_nodes import distill as run_node

pytestmark = pytest.mark.usefixtures("distilling")

CAPTIONS = ["red apple", "sun with face", "octopus", "purple heart"]


def conditioning(text):
    return [[demo.text_encoder().encode(text), {}]]


def pictures(size=16):
    """Plain pictures of one colour each, as a LATENT."""
    colours = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"samples": colours.expand(4, 3, size, size).clone()}


def settings(layers=0, joint=0, **changes):
    stage = {"batch": 4, "warmup": 2}
    defaults = {
        "init": "random",
        "layers": StageSettings(layers, **stage),
        "joint": StageSettings(joint, lr=1e-3, **stage),
    }
    return DistillationSettings(**{**defaults, **changes})


def node(model, **changes):
    """The node's outputs, trained on plain pictures."""
    inputs = {
        "kernels": "by size",
        "latents": pictures(),
        "positive": [conditioning(text) for text in CAPTIONS],
        "unconditional": conditioning(""),
        "prompts": "",
        "layer_steps": 3,
        "joint_steps": 0,
        "batch_size": 2,
        "layer_rate": 1e-3,
        "joint_rate": 1e-3,
        "seed": 0,
        "folder": "run",
        "save_every": 1,
        "preview_every": 0,
        "losses": "ours",
        "initialization": "random",
        "precision": "float32",
        "gradient_checkpointing": True,
        "accumulate": 1,
        "samples": 2,
        "sample_size": 16,
        **changes,
    }
    return run_node(model, **inputs)


def forward(model, size=16):
    """ε̂ of a loaded MODEL on a fixed input."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    context = demo.text_encoder().encode("cat face")
    return model.model.diffusion_model(
        x, torch.tensor([500.0]), context=context, transformer_options={}
    )


def data_of(teacher, count=4, size=32):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(count, 3, 4, 4, generator=generator).clamp(-1, 1)
    latents = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    encoder = demo.text_encoder()
    conditions = [(encoder.encode(text), {}) for text in CAPTIONS[:count]]
    return Dataset(list(latents), conditions, (encoder.encode(""), {}))


@pytest.fixture
def differentiable(comfy):
    """Whether this ComfyUI can load a base again for training."""
    import inspect

    from comfy.model_patcher import ModelPatcher

    return "force_deepcopy" in inspect.signature(ModelPatcher.clone).parameters


def test_node_distils_and_leaves_the_base_as_it_was(model, differentiable):
    from comfyui_deltaconv.nodes.apply import DeltaConvApply

    before = forward(model)
    weights, loss_map, report = node(model, joint_steps=2 * differentiable)
    assert len(loss_map["loss"]) == 3 + 2 * differentiable
    assert all(math.isfinite(loss) for loss in loss_map["loss"])
    assert "layers: 3 steps" in report
    assert not weights.state(next(iter(weights.sites)))["conv_up.weight"].is_inference()
    assert torch.equal(forward(model), before)
    patched = DeltaConvApply.execute(model, weights).args[0]
    assert not torch.equal(forward(patched), before)
    assert torch.equal(forward(model), before)
    assert not any(parameter.grad is not None for parameter in model.model.parameters())


def test_joint_stage_runs_or_is_refused_by_name(model, differentiable):
    if differentiable:
        _, loss_map, _ = node(model, layer_steps=0, joint_steps=2)
        assert len(loss_map["loss"]) == 2
    else:
        with pytest.raises(ValueError, match=r"update ComfyUI to 0\.30\.0"):
            node(model, layer_steps=0, joint_steps=2)
        assert not Path(folder("run")).exists()


def folder(name):
    from comfyui_deltaconv.nodes.host.distillation import state_folder

    return state_folder(name)


def test_interrupt_saves_and_queueing_again_goes_on(model):
    import comfy.model_management
    import comfy.utils

    straight = node(model, layer_steps=5, folder="straight")[1]["loss"]

    def interrupt(value, total, preview, node_id=None, **_):
        if value >= 3:
            comfy.model_management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(interrupt)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            node(model, layer_steps=5)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    assert not comfy.model_management.in_training
    done = int(state_files(folder("run"))[0].stem.split("-")[1])
    assert 1 <= done < 5
    _, loss_map, report = node(model, layer_steps=5)
    assert loss_map["loss"] == straight
    assert f"resumed after {done} steps" in report


def test_memory_after_is_memory_before(model, differentiable):
    forward(model)
    gc.collect()
    before = live_bytes()
    node(model, layer_steps=2, joint_steps=2 * differentiable, preview_every=2)
    gc.collect()
    assert live_bytes() == pytest.approx(before, rel=0.01)


def live_bytes():
    """Bytes of all live tensors' storages."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture
def progress(comfy):
    """(value, total, preview) of everything that a node shows of its progress."""
    import comfy.utils

    shown = []

    def hook(value, total, preview, node_id=None, **_):
        shown.append((value, total, preview))

    comfy.utils.set_progress_bar_global_hook(hook)
    yield shown
    comfy.utils.set_progress_bar_global_hook(None)


@pytest.mark.any_comfyui
def test_pictures_of_teacher_and_student_and_the_curve_are_shown(model, progress):
    node(model, layer_steps=4, preview_every=2)
    kinds = [(kind, picture.size) for _, _, (kind, picture, _) in filter(lambda p: p[2], progress)]
    assert [kind for kind, _ in kinds] == ["JPEG"] * 2
    # Two pairs side by side; matplotlib's curve below them where it is installed.
    assert all(width >= 2 * 2 * 160 and height >= 160 for width, height in kinds[0][1:])
    _, _, (_, picture, _) = progress[-1]
    assert np.asarray(picture.convert("L")).std() > 10
    assert max(value for value, total, _ in progress if total == 5) == 5


@pytest.mark.any_comfyui
def test_progress_is_shown_of_samples_and_initialisation_too(model, progress):
    own = {"latents": None, "positive": None, "unconditional": None, "prompts": "octopus"}
    node(model, **own, layer_steps=1, samples=3, initialization="informed", batch_size=8)
    totals = [total for _, total, _ in progress]
    assert 20 in totals and 100 in totals and totals[-1] == 2
    # A bar that was full begins anew.
    first = {total: value / total for value, total, _ in reversed(progress)}
    assert first[20] < 0.5 and first[100] < 0.5


def test_time_left_is_from_the_pace_of_this_run(monkeypatch):
    from comfyui_deltaconv.nodes.host import preview

    now = [100.0]
    monkeypatch.setattr(preview.time, "monotonic", lambda: now[0])
    preview = preview.LivePreview(None, 0)
    said = []
    for step in (4, 5, 6):
        record = SimpleNamespace(
            stage="layers", step=step, steps=10, loss=1.0, settings=settings(10, 9)
        )
        monkeypatch.setattr(preview, "_say", lambda text, at_once=False: said.append(text))
        preview.show(record)
        now[0] += 2
    # 20 units in all; 13 are left after step 6, of two seconds each.
    assert said[0] == "layers 4/10, loss 1" and said[2] == "layers 6/10, loss 1, 0:26 left"


def test_clip_that_pushes_the_model_out_is_no_trouble(model):
    """A large text encoder takes all memory there is."""
    import comfy.model_management

    class Greedy:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, text):
            comfy.model_management.unload_all_models()
            return conditioning(text)

    weights = node(model, positive=None, prompts="\n".join(CAPTIONS), clip=Greedy())[0]
    assert len(weights.sites) == 10


def test_model_unloaded_while_it_is_used_is_said(model):
    import comfy.model_management
    from comfyui_deltaconv.nodes.host.teacher import ComfyTeacher

    with torch.inference_mode(False):
        teacher = ComfyTeacher(model)
        with teacher, pytest.raises(ValueError, match="unloaded while it was used"):
            comfy.model_management.unload_all_models()
            list(distill(teacher, dict.fromkeys(teacher.dims, 3), data_of(teacher), settings(1)))


def test_another_reading_of_noise_levels_is_another_base(model):
    import comfy.model_sampling
    from comfyui_deltaconv.nodes.host.fingerprint import fingerprint

    class OtherSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    class Velocity(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    def scaled_by(strength):
        def patch(h, hsp, options):
            return h * strength, hsp

        clone = model.clone()
        clone.set_model_output_block_patch(patch)
        return clone

    found = {fingerprint(model)}
    for sampling in (OtherSampling, Velocity):
        clone = model.clone()
        clone.add_object_patch("model_sampling", sampling(model.model.model_config))
        found.add(fingerprint(clone))
    found |= {fingerprint(scaled_by(strength)) for strength in (1.1, 1.2)}
    assert len(found) == 5
    assert fingerprint(scaled_by(1.2)) in found and fingerprint(model.clone()) in found


def test_applied_blocks_do_not_make_another_base(model):
    from comfyui_deltaconv.nodes.apply import DeltaConvApply
    from comfyui_deltaconv.nodes.host.fingerprint import fingerprint

    patched = DeltaConvApply.execute(model, read_weights(demo.DELTACONV_PATH)).args[0]
    assert fingerprint(patched) == fingerprint(model)


@pytest.mark.any_comfyui
def test_what_a_distillation_keeps_is_not_offered_as_weights(model):
    from comfyui_deltaconv.nodes.host.folders import list_files, output_folder, register_folders

    register_folders()
    node(model, latents=None, positive=None, unconditional=None, prompts="octopus")
    kept = list(Path(output_folder()).rglob("*.safetensors"))
    assert len(kept) == 3
    (Path(output_folder()) / "distillation" / "mine.safetensors").write_bytes(kept[0].read_bytes())
    mine = [name for name in list_files() if "distillation" in name]
    assert [Path(name).name for name in mine] == ["mine.safetensors"]


@pytest.mark.any_comfyui
def test_record_counts_every_step_once(model):
    assert node(model)[0].training["steps"] == 3
    assert node(model, layer_steps=5)[0].training["steps"] == 5
    assert node(model, layer_steps=5)[0].training["steps"] == 5


def test_recipe_that_keeps_all_layers_is_refused(model):
    with pytest.raises(ValueError, match="keeps them all"):
        node(model, recipe=Recipe({site: None for site in read_weights(demo.DELTACONV_PATH).sites}))


def test_own_samples_are_drawn_from_prompts_and_cached(model):
    cached = folder("run").parent / "samples"
    node(model, latents=None, positive=None, unconditional=None, prompts="red apple\ncat face")
    # Beside it lies the lock that keeps another process out.
    (file,) = (path for path in cached.iterdir() if not path.name.startswith("."))
    stamp = file.stat().st_mtime_ns
    node(model, latents=None, positive=None, unconditional=None, prompts="red apple\ncat face")
    assert file.stat().st_mtime_ns == stamp


def test_queueing_a_complete_distillation_again_returns_its_weights(model):
    first, second = node(model), node(model)
    assert "complete" in second[2] and second[1] == first[1]
    for site in first[0].sites:
        a, b = first[0].state(site), second[0].state(site)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_recipe_chooses_sites_and_kernels(model):
    site = "middle_block.1.transformer_blocks.0.attn1"
    recipe = Recipe({site: BlockPlan(3, (1.0,))})
    weights, _, _ = node(model, recipe=recipe, layer_steps=1)
    assert list(weights.sites) == [site]
    assert weights.sites[site].kernel_size == 3 and weights.scales[site] == (1.0,)


def test_kernels_with_pooled_tokens_have_the_layers_own_heads(model):
    weights, _, _ = node(
        model, kernels="5 and pooled tokens", layer_steps=1, initialization="informed"
    )
    assert weights.training["settings"]["growth"] == 10
    heads = {geometry.dim: geometry.heads for geometry in weights.sites.values()}
    assert heads == {64: 2, 128: 4}
    assert {geometry.kernel_size for geometry in weights.sites.values()} == {5}
    # What they go on from counts, as a recipe does, and not the widget.
    again, _, _ = node(
        model, start=weights, folder="again", kernels="5 and pooled tokens", layer_steps=1
    )
    assert again.sites == weights.sites and again.scales == weights.scales
    assert again.training["settings"]["growth"] == 1


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x"])
def test_folders_outside_are_refused(model, name):
    with pytest.raises(ValueError, match="below"):
        node(model, folder=name)


def test_folder_of_the_own_samples_is_refused(model):
    with pytest.raises(ValueError, match="own samples"):
        node(model, folder="samples")


def test_nothing_to_train_on_is_said(model):
    with pytest.raises(ValueError, match="prompts to train with, got none"):
        node(model, positive=None)


def test_another_base_is_refused_by_name(model):
    node(model, layer_steps=1)
    patched = with_lora(model, 0.1)
    with pytest.raises(ValueError, match="of this base"):
        node(patched, layer_steps=2)


def with_lora(model, strength):
    """A clone with a change on every attn1's value projection, as a LoRA makes it."""
    clone, patches = model.clone(), {}
    generator = torch.Generator().manual_seed(7)
    for key, tensor in model.model.state_dict().items():
        if key.endswith("attn1.to_v.weight"):
            change = torch.randn(tensor.shape, generator=generator) * strength
            patches[key] = ("diff", (change,))
    clone.add_patches(patches, 1.0)
    return clone


def layer_errors(model, weights, steps=0, size=32):
    """Mean relative layer error of `weights` on the model, before and after `steps`."""
    from comfyui_deltaconv.nodes.host.teacher import ComfyTeacher

    with torch.inference_mode(False):
        teacher = ComfyTeacher(model)
        recipe = {
            site: (geometry.kernel_size, weights.scales[site])
            for site, geometry in weights.sites.items()
        }
        chosen = settings(steps, ema=0.5)
        start = {site: weights.block(site).float() for site in weights.sites}
        with teacher:
            data = data_of(teacher, size=size)
            records = list(distill(teacher, recipe, data, chosen, start=start))
    return [record.loss for record in records if record.stage == "layers"]


@pytest.mark.any_comfyui
def test_short_layers_run_bakes_a_lora_into_the_blocks(model):
    losses = layer_errors(with_lora(model, 0.05), read_weights(demo.DELTACONV_PATH), 24, 16)
    # 0.34 to 0.41 over seeds and instruction sets.
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_node_goes_on_from_weights_it_is_given(model):
    """A LoRA is baked into weights that were made without it."""
    weights, lora = read_weights(demo.DELTACONV_PATH), with_lora(model, 0.05)
    trained = node(lora, start=weights, layer_steps=16, batch_size=4)[0]
    assert (trained.sites, trained.scales) == (weights.sites, weights.scales)
    # A first step's loss is that of the weights it began with.
    first, last = (layer_errors(lora, given, 1)[0] for given in (weights, trained))
    # 0.61 to 0.65 over seeds, threads and instruction sets.
    assert last < 0.9 * first


def test_weights_gone_on_from_keep_where_they_act(model):
    weights = read_weights(demo.DELTACONV_PATH)
    late = weights.only(list(weights.sites)[:2], 0.4)
    trained = node(model, start=late, layer_steps=1)[0]
    assert (trained.start, trained.sites) == (0.4, late.sites)
    recipe = Recipe(late.plans, start=0.2)
    trained = node(model, start=late, recipe=recipe, folder="recipe", layer_steps=1)[0]
    assert (trained.start, trained.sites) == (0.2, late.sites)


def test_weights_to_start_from_must_fit_the_recipe(model):
    site = "middle_block.1.transformer_blocks.0.attn1"
    recipe = Recipe({site: BlockPlan(3, (1.0,))})
    with pytest.raises(ValueError, match=f"start from at {site}"):
        node(model, recipe=recipe, start=read_weights(demo.DELTACONV_PATH))


def test_latents_of_another_model_are_refused(model):
    with pytest.raises(ValueError, match=r"Expected latents \[B, 3, H, W\].*got \[1, 4, 8, 8\]"):
        node(model, latents={"samples": torch.zeros(1, 4, 8, 8)})
    assert not Path(folder("run")).exists()


def test_out_of_memory_for_a_preview_does_not_stop_the_training(model, monkeypatch):
    from comfyui_deltaconv.nodes.host import preview

    def fails(*_, **__):
        raise torch.OutOfMemoryError("out of memory, as the test asked")

    monkeypatch.setattr(preview, "sample", fails)
    assert len(node(model, preview_every=1)[1]["loss"]) == 3


@pytest.mark.any_comfyui
def test_loss_falls_on_the_demo_teacher_and_informed_is_better(model):
    from comfyui_deltaconv.nodes.host.teacher import ComfyTeacher

    with torch.inference_mode(False):
        teacher = ComfyTeacher(model)
        recipe = dict.fromkeys(teacher.dims, 7)
        data = data_of(teacher, size=16)
        with teacher:
            trained = list(distill(teacher, recipe, data, settings(20)))
            informed = list(
                distill(teacher, recipe, data, settings(1, init="informed", init_images=32))
            )
            losses = [record.loss for record in trained[1:]]
            # 0.37 to 0.38 over seeds and instruction sets.
            assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
            errors = [
                held_out_error(teacher, run[-1].student.averaged_blocks(), data, batches=2, batch=4)
                for run in (trained, informed)
            ]
    # 0.20 to 0.24 over seeds and instruction sets.
    assert errors[1] < 0.7 * errors[0]


def test_checkpointing_changes_no_gradient(model, differentiable):
    if not differentiable:
        # Nothing to compare: the joint stage is refused there, and tested to be.
        return
    from comfyui_deltaconv.nodes.host.teacher import ComfyTeacher

    forwards = {}

    def last(active):
        with torch.inference_mode(False):
            teacher = ComfyTeacher(model, differentiable=True)
            middle = teacher.patcher.model.diffusion_model.middle_block[1].proj_in
            middle.register_forward_hook(
                lambda *_: forwards.update({active: forwards.get(active, 0) + 1})
            )
            losses = {"teacher": 1.0, "normalised_features": 0.1}
            chosen = settings(0, 3, losses=losses, checkpointing=active)
            recipe = dict.fromkeys(teacher.dims, 3)
            with teacher:
                records = list(distill(teacher, recipe, data_of(teacher, size=16), chosen))
            return records[-1].student.ema

    plain, recomputed = last(False), last(True)
    assert all(torch.allclose(plain[n], recomputed[n], atol=1e-6) for n in plain)
    # Teacher and student of three steps; with checkpointing each student runs once more.
    assert forwards[False] == 6 and forwards[True] > 6


def test_evaluate_node_wants_a_prompt_for_every_conditioning(model):
    from comfyui_deltaconv.nodes.evaluate import DeltaConvEvaluate

    both = conditioning("red apple") + conditioning("octopus")
    with pytest.raises(ValueError, match="each of 2 conditionings, got 3"):
        DeltaConvEvaluate.execute(
            model, read_weights(demo.DELTACONV_PATH), positive=both, prompts="a\nb\nc"
        )


@pytest.mark.any_comfyui
def test_evaluate_node_tells_good_weights_from_bad(model):
    from comfyui_deltaconv.nodes.evaluate import DeltaConvEvaluate

    inputs = {
        "positive": conditioning("red apple"),
        "negative": conditioning(""),
        "latent": {"samples": torch.zeros(1, 3, 32, 32)},
        "seeds": "1",
        "steps": 4,
        "levels": 3,
    }
    good = DeltaConvEvaluate.execute(model, read_weights(demo.DELTACONV_PATH), **inputs).args
    bad = DeltaConvEvaluate.execute(model, node(model, layer_steps=1)[0], **inputs).args
    table, plot, grid, mse, psnr = good
    assert mse < bad[3] and psnr > bad[4]
    assert "LPIPS needs" in table and "CLIP score needs the prompts" in table
    assert "PSNR" in table and plot.ndim == grid.ndim == 4 and grid.shape[-1] == 3


@pytest.mark.any_comfyui
@pytest.mark.parametrize("seeds", ["", "-5, 1", "1.5", "18446744073709551616", "one"])
def test_evaluate_node_refuses_what_is_no_seed(seeds):
    from comfyui_deltaconv.nodes.evaluate import _seeds

    with pytest.raises(ValueError, match="Expected seeds"):
        _seeds(seeds)


def test_evaluate_node_takes_seeds_however_they_are_apart():
    from comfyui_deltaconv.nodes.evaluate import _seeds

    assert _seeds(" 1, 2;3\n4 18446744073709551615 ") == [1, 2, 3, 4, 2**64 - 1]


def test_evaluate_node_wants_only_the_size_of_a_latent(model):
    from comfyui_deltaconv.nodes.evaluate import DeltaConvEvaluate

    inputs = {"latent": {"samples": torch.zeros(1, 4, 16, 24)}, "seeds": "1", "steps": 1}
    weights = read_weights(demo.DELTACONV_PATH)
    args = DeltaConvEvaluate.execute(
        model, weights, positive=conditioning("octopus"), levels=1, **inputs
    ).args
    assert "PSNR" in args[0]
    with pytest.raises(ValueError, match="got an empty one"):
        DeltaConvEvaluate.execute(model, weights, positive=[], **inputs)


@pytest.mark.any_comfyui
def test_chosen_layers_alone_are_distilled_and_say_from_where_they_act(model, monkeypatch):
    from comfyui_deltaconv.nodes.host import distill_choice

    monkeypatch.setattr(distill_choice, "_STEPS", 4)
    monkeypatch.setattr(distill_choice, "_PROMPTS", 1)
    weights, _, report = node(model, latents=pictures(32), choice="balanced")
    kept = set(demo_sites(model)) - set(weights.sites)
    sentence = next(line for line in report.splitlines() if line.startswith("- choice: balanced:"))
    assert f"blocks in {len(weights.sites)} of {len(weights.sites) + len(kept)} layers" in sentence
    assert f"from {100 * weights.start:.3g}% of sampling on" in sentence
    # All of it in every step would save more than is asked for.
    assert kept or weights.start


@pytest.mark.any_comfyui
def test_where_no_block_is_faster_all_are_distilled(model, monkeypatch):
    from comfyui_deltaconv.deltaconv.distillation.choice import SiteCost
    from comfyui_deltaconv.nodes.host import distill_choice

    sites = demo_sites(model)
    slower = dict.fromkeys(sites, SiteCost(1.0, 2.0)), "as a test says"
    monkeypatch.setattr(distill_choice, "site_costs", lambda *arguments: slower)
    weights, _, report = node(model, choice="balanced")
    assert set(weights.sites) == set(sites) and weights.start == 0
    assert "no block is faster than attention at this size: all are distilled" in report


@pytest.mark.any_comfyui
def test_a_recipe_says_from_where_the_blocks_act(model):
    recipe = Recipe({site: BlockPlan(3) for site in demo_sites(model)}, start=0.4)
    weights, _, report = node(model, recipe=recipe, choice="balanced")
    assert weights.start == 0.4 and set(weights.sites) == set(demo_sites(model))
    assert "choice:" not in report


def demo_sites(model):
    from comfyui_deltaconv.nodes.host.sites import find_sites

    return tuple(find_sites(model).dims)
