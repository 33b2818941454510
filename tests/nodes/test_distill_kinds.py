"""Distillation, evaluation and choice on every kind of transformer."""

import inspect
import math

import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock
from comfyui_deltaconv.deltaconv.distillation import (
    Dataset,
    DistillationSettings,
    StageSettings,
    distill,
)
from comfyui_deltaconv.deltaconv.distillation.choice import SiteCost
from comfyui_deltaconv.deltaconv.distillation.evaluation import held_out_error
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
from distill_nodes import distill as run_node
from family_models import KINDS
from host_models import bits

pytestmark = pytest.mark.usefixtures("distilling")


# Anima is Cosmos-Predict2's class with text modules, which take a second to make each time.
@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.long] * (name == "Anima")) for name in KINDS]
)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def model(kind, comfy):
    return kind.loaded()


@pytest.fixture
def reloads(comfy):
    """Whether this ComfyUI can load a base again for training."""
    from comfy.model_patcher import ModelPatcher

    return "force_deepcopy" in inspect.signature(ModelPatcher.clone).parameters


def smooth(kind, count, seed=3):
    """Latents [C, H, W] without noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, kind.channels, 3, 3, generator=generator)
    return torch.nn.functional.interpolate(coarse, kind.size, mode="bilinear")


def data_of(kind, count=4):
    with torch.inference_mode(False):
        conditions = [tuple(kind.prompt(seed)[0]) for seed in range(count)]
        return Dataset(list(smooth(kind, count)), conditions, tuple(kind.prompt(99)[0]))


def stages(layers=0, joint=0, **changes):
    stage = {"batch": 4, "warmup": 1, "schedule": "constant"}
    defaults = {
        "init": "random",
        "init_images": 16,
        "layers": StageSettings(layers, lr=1e-2, **stage),
        "joint": StageSettings(joint, lr=3e-3, **stage),
        "losses": {"teacher": 1.0, "normalised_features": 0.1},
    }
    return DistillationSettings(**{**defaults, **changes})


def node(kind, model, **changes):
    inputs = {
        "kernels": "by size",
        "positive": [kind.prompt(seed) for seed in (1, 2)],
        "unconditional": kind.prompt(3),
        "prompts": "",
        "layer_steps": 2,
        "joint_steps": 0,
        "batch_size": 2,
        "seed": 0,
        "folder": "run",
        "save_every": 100,
        "preview_every": 0,
        "initialization": "random",
        "samples": 2,
        "sample_size": 8,
        **changes,
    }
    return run_node(model, **inputs)


def test_three_stages_from_latents_leave_the_base_as_it_was(kind, model, reloads):
    """Latents as the family's VAE makes them, with a frame where it has frames."""
    before = bits(model)
    stock = kind.sample(model, 1)
    samples = smooth(kind, 2)
    latents = {"samples": samples[:, :, None] if kind.frames else samples}
    weights, losses, report = node(kind, model, latents=latents, joint_steps=2 * reloads)
    assert len(losses["loss"]) == 2 + 2 * reloads and all(map(math.isfinite, losses["loss"]))
    assert "layers: 2 steps" in report and ("joint: 2 steps" in report) == reloads
    assert list(weights.sites) == kind.sites and weights.gate == "scaled"
    after = bits(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(kind.sample(model, 1), stock)


def test_pooled_tokens_are_refused_before_anything_is_drawn(kind, model, tmp_path):
    """Positions or norms stand between these models' maps and what their attention compares."""
    with pytest.raises(ValueError, match=f"linear in the map .* got another at {kind.sites[0]}"):
        node(kind, model, kernels="5 and pooled tokens")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.any_comfyui
def test_own_samples_are_drawn_judged_and_chosen_from(kind, model, monkeypatch):
    from comfyui_deltaconv.nodes.choose import DeltaConvChoose
    from comfyui_deltaconv.nodes.evaluate import DeltaConvEvaluate
    from comfyui_deltaconv.nodes.host import choose

    weights, _, report = node(kind, model)
    assert "own samples: 2 drawn" in report
    arguments = (weights, kind.prompt(1), kind.prompt(3))
    latent = {"samples": kind.latent()}
    table, *_, mse, psnr = DeltaConvEvaluate.execute(
        model, *arguments, latent=latent, seeds="1", steps=1, levels=2
    ).args
    assert mse > 0 and math.isnan(psnr) and all(site in table for site in kind.sites)
    # On maps this small, times are the machine's noise.
    costs = {site: SiteCost(1.0, 0.5) for site in kind.sites}
    monkeypatch.setattr(choose, "site_costs", lambda *_: (costs, "as the test says"))
    chosen, recipe, curve, report = DeltaConvChoose.execute(
        model, *arguments, latent=latent, steps=2, preset="fastest"
    ).args
    assert list(chosen.sites) == list(recipe.replaced) == kind.sites and curve.ndim == 4


def test_informed_blocks_beat_random_ones(kind, model, reloads):
    """Of the layers, after one step; and of the whole model, with the prompts that were seen."""
    from comfyui_deltaconv.nodes.host.teacher import ComfyTeacher

    data, layers, whole = data_of(kind), {}, {}
    with torch.inference_mode(False), torch.enable_grad():
        teacher = ComfyTeacher(model, differentiable=reloads)
        with teacher:
            for init in ("random", "informed"):
                plans, errors = dict.fromkeys(teacher.dims, 5), []

                def judge(record, errors=errors):
                    blocks = record.student.averaged_blocks()
                    options = {"batches": 2, "batch": 4, "unconditional": 0.0}
                    errors.append(held_out_error(teacher, blocks, data, **options))

                joint = 6 * reloads * (init == "informed")
                for record in distill(teacher, plans, data, stages(1, joint, init=init)):
                    if record.stage == "init" or record.step == record.steps:
                        judge(record)
                    if record.stage == "layers":
                        layers[init] = record.loss
                whole[init] = errors
    assert layers["informed"] < 0.5 * layers["random"]
    assert whole["informed"][0] < 0.5 * whole["random"][0]
    # The joint stage lowers what a single step of the layers has left.
    assert not reloads or whole["informed"][2] < whole["informed"][1]


@pytest.mark.any_comfyui
def test_initialization_sees_what_attention_compares(kind, model):
    """q and k behind norms and rotary positions, without a change of what the model predicts."""
    from comfyui_deltaconv.deltaconv.distillation.teacher import in_place_of_attention
    from comfyui_deltaconv.nodes.host.teacher import ComfyTeacher

    data, seen = data_of(kind, 2), {}
    with torch.inference_mode(False), torch.no_grad():
        teacher = ComfyTeacher(model)
        x, sigma = torch.stack(list(data.latents)), torch.tensor([0.7, 0.3])

        def visit(site, x, attend):
            def look(q, k, scale):
                seen[site] = (q, k, scale, x)

            return attend(look)

        with teacher:
            arguments = (x, sigma, data.conditions)
            stock = teacher.predict(*arguments, in_place_of_attention({}))
            assert torch.equal(teacher.predict(*arguments, visit), stock)
            values = {site: teacher.values(site) for site in kind.sites}
            outputs = {}

            def keep(site, x, attend):
                outputs[site] = attend()
                return outputs[site]

            teacher.predict(*arguments, keep)
    assert list(seen) == kind.sites
    for site, (q, k, scale, x) in seen.items():
        assert q.shape == k.shape == (2, values[site].heads, x.shape[1] * x.shape[2], q.shape[-1])
        # What a layer does: its mean attention carries the values, and an affine map follows.
        p = (q.double() @ k.double().mT * (scale or q.shape[-1] ** -0.5)).softmax(-1)
        v = (x.flatten(1, 2).double() @ values[site].matrix.double().T).unflatten(
            -1, (values[site].heads, -1)
        )
        carried = torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2).flatten(0, 1)
        y = outputs[site].flatten(1, 2).flatten(0, 1).double()
        ones = carried.new_ones(len(carried), 1)
        solution = torch.linalg.lstsq(torch.cat([carried, ones], 1), y).solution
        left = torch.cat([carried, ones], 1) @ solution - y
        # A hundredth with q and k before their norms and positions.
        assert left.abs().max() < 1e-4 * y.abs().max()


def test_gradients_are_those_without_recomputation(kind, model, reloads):
    """Of features too, which some models change in place behind their capture."""
    from comfyui_deltaconv.nodes.host.teacher import ComfyTeacher

    if not reloads:
        pytest.skip("this ComfyUI cannot load a base again for training")
    data, found = data_of(kind, 2), []
    with torch.inference_mode(False), torch.enable_grad():
        x, sigma = torch.stack(list(data.latents)), torch.tensor([0.7, 0.3])
        teacher = ComfyTeacher(model, differentiable=True)
        assert not teacher.why_not_differentiable
        with teacher:
            for recompute in (False, True):
                teacher.checkpointing(recompute)
                gains = {site: torch.ones((), requires_grad=True) for site in kind.sites}
                features = {}

                def visit(site, x, attend, gains=gains):
                    return attend() * gains[site]

                eps = teacher.predict(x, sigma, data.conditions, visit, features)
                kept = {site: feature.detach().clone() for site, feature in features.items()}
                loss = eps.square().mean() + sum(f.square().mean() for f in features.values())
                loss.backward()
                assert all(torch.equal(features[site], kept[site]) for site in kept)
                assert list(features) == kind.sites
                found.append([float(gain.grad) for gain in gains.values()])
            teacher.checkpointing(False)
            stock = teacher.predict(x, sigma, data.conditions).detach()
        # Where gradients pass, some layers compute by other operators.
        assert (eps.detach() - stock).abs().max() <= 1e-5 * stock.abs().max()
    assert found[0] == pytest.approx(found[1], rel=1e-4) and all(found[0])


@pytest.mark.any_comfyui
def test_latents_of_another_kind_are_refused_before_anything_is_changed(kind, model):
    shapes = [(1, kind.channels + 1, *kind.size)]
    shapes.append((1, kind.channels, 3 if kind.frames else 1, *kind.size))
    for shape in shapes:
        with pytest.raises(ValueError, match=f"Expected latents .*{kind.channels}, H, W") as error:
            node(kind, model, latents={"samples": torch.zeros(shape)})
        assert str(list(shape)) in str(error.value)
    assert not model.object_patches


@pytest.mark.any_comfyui
@pytest.mark.parametrize("kind", ["Wan", "LTX-Video", "HunyuanDiT"], indirect=True)
def test_previews_show_a_latent_of_any_kind(kind, model, monkeypatch):
    """By the family's own factors, which some formats have for latents with frames alone."""
    import latent_preview
    from comfy.cli_args import args
    from comfyui_deltaconv.nodes.host.preview import decoded
    from comfyui_deltaconv.nodes.host.teacher import ComfyTeacher

    by_factors = latent_preview.LatentPreviewMethod.Latent2RGB
    monkeypatch.setattr(args, "preview_method", by_factors)
    with torch.inference_mode(False):
        picture = decoded(ComfyTeacher(model), smooth(kind, 1)[0])
    assert picture.size == kind.size[::-1]


@pytest.mark.any_comfyui
def test_pictures_of_a_vae_of_videos_are_compared(comfy):
    """Wan's gives [B, T, H, W, 3]; Anima and Cosmos-Predict2 have the same."""
    import comfy.ldm.wan.vae
    import comfy.sd
    from comfyui_deltaconv.nodes.evaluate import DeltaConvEvaluate

    kind = KINDS["Wan"]
    torch.manual_seed(4)
    size = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    made = comfy.ldm.wan.vae.WanVAE(
        **size, attn_scales=[], temperal_downsample=[False, True, True], dropout=0.0
    )
    state = {name: torch.randn_like(tensor) * 0.1 for name, tensor in made.state_dict().items()}
    vae = comfy.sd.VAE(sd=state)
    blocks = {site: DeltaConvBlock(kind.dim, 3) for site in kind.sites}
    arguments = (weights_of_blocks(blocks), kind.prompt(1), kind.prompt(3), vae)
    latent = {"samples": kind.latent((4, 6))}
    table, _, grid, _, psnr = DeltaConvEvaluate.execute(
        kind.build(), *arguments, latent, seeds="1", steps=1, levels=1
    ).args
    assert math.isfinite(psnr) and grid.ndim == 4 and "PSNR" in table
