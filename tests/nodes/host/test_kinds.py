"""Every kind of transformer in the real ComfyUI: small models of its own classes."""

import logging
import re

import patched_models as models
import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock
from comfyui_deltaconv.deltaconv.families import FAMILIES
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
from family_models import KINDS, TEXT, Kind

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

# One version of ComfyUI does where both have the same file of a class.
SAME = {"Anima", "HunyuanDiT", "Kandinsky 5"}


def params(names):
    """These kinds, by name."""
    return [
        pytest.param(KINDS[name], id=name, marks=[pytest.mark.any_comfyui] * (name in SAME))
        for name in names
    ]


# Anima is Cosmos-Predict2's class with text modules, which take a second to make each time.
@pytest.fixture(
    params=[
        pytest.param(param.values[0], id=param.id, marks=[*param.marks, pytest.mark.long])
        if param.id == "Anima"
        else param
        for param in params(KINDS)
    ]
)
def kind(request) -> Kind:
    return request.param


@pytest.fixture
def model(kind, comfy):
    return kind.build()


@pytest.fixture
def weights(kind):
    return weights_for(kind)


def weights_for(kind):
    torch.manual_seed(1)
    return weights_of_blocks({site: DeltaConvBlock(kind.dim, 5) for site in kind.sites})


def find(model):
    from comfyui_deltaconv.nodes.host.sites import find_sites

    return find_sites(model)


def said(caplog):
    return [r.getMessage() for r in caplog.records if "whole map" in r.getMessage()]


@pytest.mark.parametrize("kind", params(KINDS), indirect=True)
def test_sites_are_the_image_blocks_alone(kind, model):
    found = find(model)
    assert found.dims == dict.fromkeys(kind.sites, kind.dim)
    transformer = model.model.diffusion_model
    for path, site in found.sites.items():
        attention = transformer.get_submodule(path)
        assert site.parameters == sum(p.numel() for p in attention.parameters())
        assert site.level == 0
    assert found.map_size(kind.sites[0], *kind.size) == kind.map_size
    assert found.text_shape(transformer)[1] == TEXT
    modules = dict(transformer.named_modules())
    assert all(found.after_residual(site) in modules for site in found.sites.values())
    assert set(found.recomputable(transformer)) <= set(modules)


# Parameters that the families' own model cards name, in billions.
BILLIONS = {
    "anima": 2,
    "cosmos-predict2": 2,
    "cosmos-predict2-14b": 14,
    "hunyuandit": 1.5,
    "wan-1.3b": 1.3,
    "wan-14b": 14,
    "wan2.2-5b": 5,
    "kandinsky5-image": 6,
    "ltxv-2b": 2,
    "ltxv-13b": 13,
}


@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, family) for kind in KINDS.values() for family in kind.real],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.any_comfyui
def test_families_are_the_rows_that_real_sizes_have(kind, family, comfy):
    model = kind.real_model(family)
    found = find(model)
    cells = 2048 // model.get_model_object("latent_format").spacial_downscale_ratio
    side = 2048 // FAMILIES[family].token
    assert found.map_size(next(iter(found.dims)), cells, cells) == (side, side)
    assert found.family == family
    assert found.dims == dict(FAMILIES[family].dims)
    parameters = sum(p.numel() for p in model.model.diffusion_model.parameters())
    # Cards round, and Anima's count leaves its text modules out.
    assert parameters / 1e9 == pytest.approx(BILLIONS[family], rel=0.12)
    dim = next(iter(found.dims.values()))
    # Four projections, with biases and norms in some.
    assert all(0 <= site.parameters - 4 * dim**2 <= 6 * dim for site in found.sites.values())


def test_every_family_without_published_blocks_is_held_against_its_class():
    real = {family for kind in KINDS.values() for family in kind.real}
    assert real == {name for name, family in FAMILIES.items() if not family.num_res_blocks} - {
        "pixart"
    }


@pytest.mark.parametrize("kind", params(KINDS), indirect=True)
def test_blocks_take_attentions_place_and_leave_without_a_trace(kind, model, weights):
    stock = kind.sample(model)
    patched, report = models.apply(model, weights)
    student = kind.sample(patched)
    assert (stock - student).abs().max() > 1e-2 * stock.abs().max()
    assert f"{kind.depth} of {kind.depth}" in report
    for _ in range(2):
        assert torch.equal(kind.sample(model), stock)
        assert torch.equal(kind.sample(patched), student)
    assert torch.equal(kind.sample(model), stock)
    assert not any("deltaconv" in key for key in model.object_patches)


def test_a_block_computes_the_padded_map(kind, model, weights):
    """By hand: the module's own forward exchanged for the block on rows × columns."""
    patched, _ = models.apply(model, weights)
    student = kind.sample(patched)
    by_hand, maps = model.clone(), set()
    for site in kind.sites:
        block, original = weights.block(site), model.model.diffusion_model.get_submodule(site)

        def forward(x, *arguments, block=block, original=original, **named):
            maps.add(tuple(x.shape[1:]))
            y = block(x.unflatten(1, kind.map_size)).flatten(1, 2)
            return (y,) if kind.name == "HunyuanDiT" else y

        by_hand.add_object_patch(f"diffusion_model.{site}.forward", forward)
    expected = kind.sample(by_hand)
    rows, columns = kind.map_size
    assert maps == {(rows * columns, kind.dim)}
    assert (student - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "kind", params(name for name, kind in KINDS.items() if kind.frames), indirect=True
)
def test_a_video_runs_plain_attention_and_says_so_once(kind, model, weights, caplog):
    latent = kind.latent(frames=3)
    stock = kind.sample(model, latent=latent)
    patched, _ = models.apply(model, weights)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(kind.sample(patched, latent=latent), stock)
    (sentence,) = said(caplog)
    assert "got a video of 3 frames. Plain attention runs" in sentence
    assert "HyperTile" not in sentence


def test_percent_range_and_sites(kind, model, weights):
    stock, student = (kind.sample(m, 4) for m in (model, models.apply(model, weights)[0]))
    late, _ = models.apply(model, weights, start_percent=0.4)
    one, report = models.apply(model, weights, sites=f"{kind.sites[1]}, -{kind.sites[0]}")
    assert f"1 of {kind.depth}" in report
    for got in (kind.sample(late, 4), kind.sample(one, 4)):
        assert not torch.equal(got, stock) and not torch.equal(got, student)


def test_layers_are_timed_alone_at_the_size_of_a_latent(kind, model, weights):
    from comfy.patcher_extension import CallbacksMP

    latent = {"samples": kind.latent()}
    patched, report = models.apply(model, weights, latent=latent, when="where faster")
    assert re.search(rf"blocks run in \d of {kind.depth} layers and shapes at batch 2", report)
    (call, *_) = patched.get_all_callbacks(CallbacksMP.ON_CLEANUP)
    application = call.__self__
    timed = dict.fromkeys((site, (2, *kind.map_size)) for site in kind.sites).keys()
    assert application.chosen.keys() == timed
    # Sampling with guidance meets these shapes and no other.
    kind.sample(patched)
    assert application.chosen.keys() == timed


def test_a_layer_alone_computes_what_it_computes_in_the_model(kind, model):
    """The positions that a layer is timed with are those that the model gives it."""
    from comfyui_deltaconv.nodes.host.patch import detach

    found, clone, seen = find(model), detach(model), []
    found.prepare(clone, "test")
    site = found.sites[kind.sites[1]]
    module = model.model.diffusion_model.get_submodule(site.path)

    def noting(x, *arguments, original=module.forward, **named):
        y = original(x, *arguments, **named)
        seen.append((x, y))
        return y

    clone.add_object_patch(site.forward_key, noting)
    kind.sample(clone, 1)
    x, expected = seen[0]
    options = {}
    given = found.example_call(model.model.diffusion_model, site, x, kind.size, options)
    got = module.forward(x, **given)
    if kind.name == "HunyuanDiT":
        got, expected = got[0], expected[0]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_attention_is_seen_as_it_acts(kind, model):
    """q and k behind their norms and rotary positions: the product is what attention computes."""
    from comfyui_deltaconv.nodes.host.patch import detach

    found, clone, seen = find(model), detach(model), []
    found.prepare(clone, "test")
    site = found.sites[kind.sites[1]]
    module = model.model.diffusion_model.get_submodule(site.path)
    tokens = kind.map_size[0] * kind.map_size[1]

    def inspect(heads):
        q, k, v, size, scale, problem = heads
        assert (size, problem) == (kind.map_size, "") and q.shape[2] == tokens
        assert q.shape[1] * q.shape[3] == kind.dim
        seen.append(size)
        scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    forward = found.inspecting(site, module, module.forward, inspect)
    clone.add_object_patch(site.forward_key, forward)
    stock = kind.sample(model)
    assert (kind.sample(clone) - stock).abs().max() <= 1e-4 * stock.abs().max()
    assert seen


def test_locality_is_that_of_brute_force(kind, model):
    """Of the q and k that a layer compares, every query counted, on a map that is not square."""
    from comfyui_deltaconv.deltaconv.locality.profile import mean_distance, window_mass
    from comfyui_deltaconv.deltaconv.locality.settings import LocalityPlan
    from comfyui_deltaconv.nodes.host.probe import Probe, probed

    class Keeping(Probe):
        def observe(self, site, q, k, height, width, scale):
            kept[site.path] = (q, k, scale)
            super().observe(site, q, k, height, width, scale)

    kept = {}
    probe = Keeping(find(model), LocalityPlan(queries=10**6))
    probe.watching = True
    stock = kind.sample(model, 1)
    assert torch.equal(kind.sample(probed(model, probe.model_sites, probe), 1), stock)
    statistics, _ = probe.take()
    assert list(statistics) == kind.sites and not probe.left_out
    rows, columns = kind.map_size
    index = torch.arange(rows * columns)
    y, x = index // columns, index % columns
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    for path, (q, k, scale) in kept.items():
        found = statistics[path][-1]
        scores = q.double() @ k.double().mT * (scale or q.shape[-1] ** -0.5)
        p = scores.softmax(-1)
        inside = float((p * (torch.maximum(dy, dx) <= 2)).sum(-1).mean())
        distance = float((p * (dy**2 + dx**2).double().sqrt()).sum(-1).mean())
        assert float(window_mass(found.offsets).mean((0, 1))[2]) == pytest.approx(inside, abs=1e-4)
        assert float(mean_distance(found.offsets).mean()) == pytest.approx(distance, abs=1e-4)
        assert found.exact


def test_its_locality_is_measured_and_its_steps_are_timed(kind, model, weights):
    from comfyui_deltaconv.nodes.benchmark import DeltaConvBenchmark
    from comfyui_deltaconv.nodes.locality import DeltaConvLocality

    latent = {"samples": torch.randn_like(kind.latent())}
    report = DeltaConvLocality.execute(
        model,
        kind.prompt(),
        latent,
        percents="0.5",
        sensitivity="window and block",
        deltaconv=weights,
        window=19,
    ).args[0]
    assert {path: (site.height, site.width) for path, site in report.sites.items()} == (
        dict.fromkeys(kind.sites, kind.map_size)
    )
    for site in report.sites.values():
        # The window holds the whole map.
        assert max(site.sensitivity.window_error) < 1e-6 < min(site.sensitivity.block_error)
    cell = model.get_model_object("latent_format").spacial_downscale_ratio
    height, width = (cell * side - cell * side % (2 * cell) for side in kind.size)
    table = DeltaConvBenchmark.execute(model, weights, f"{width}x{height}", 1, 1, 5.0).args[0]
    assert f"blocks by torch in {kind.depth} of {kind.depth} layers" in table
    assert "out of memory" not in table


# Weights of each kind that lie beside its self-attention.
BESIDE = {
    "Anima": ".mlp.",
    "Cosmos-Predict2": ".mlp.",
    "HunyuanDiT": ".mlp.",
    "Wan": ".ffn.",
    "Kandinsky 5": "visual_transformer_blocks.0.feed_forward",
    "LTX-Video": ".ff.",
}


def test_a_lora_on_attention_rests_and_one_beside_it_works(kind, model, weights):
    import comfy.sd

    def lora(part):
        state = models.lora_state(model, part)
        return comfy.sd.load_lora_for_models(model, None, state, 1.0, 1.0)[0]

    student = kind.sample(models.apply(model, weights)[0])
    attention = kind.path.split("{}")[1]
    on, report = models.apply(lora(f"{attention}."), weights)
    assert "LoRA patches on replaced self-attention layers have no effect" in report
    beside, report = models.apply(lora(BESIDE[kind.name]), weights)
    assert "have no effect" not in report
    # The patch on the text modules' own attention is no patch of a site.
    if kind.name not in ("Anima", "Kandinsky 5"):
        assert torch.equal(kind.sample(on), student)
    assert not torch.allclose(kind.sample(beside), student, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_bases_of_other_dtypes_are_computed_and_restored(kind, dtype, weights, comfy):
    import comfy.supported_models

    supported = getattr(comfy.supported_models, kind.class_name).supported_inference_dtypes
    # As ComfyUI's loaders choose where a GPU can compute in bfloat16.
    model = kind.loaded(dtype, dtype if dtype in supported else torch.bfloat16)
    stock = kind.sample(model)
    student = kind.sample(models.apply(model, weights)[0])
    assert student.isfinite().all() and not torch.equal(student, stock)
    assert torch.equal(kind.sample(model), stock)
