"""The family tables against ComfyUI's real model classes, and which weights fit which model."""

import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock, WeightsError, demo, read_weights
from comfyui_deltaconv.deltaconv.families import (
    FAMILIES,
    families_of,
    from_published,
    native_latent,
    resolution_level,
    to_published,
)
from comfyui_deltaconv.deltaconv.weights.compatibility import check_fit, select_sites
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
from host_models import REAL, host_model, randomize
from published import published_paths

COUNTS = {"sd1": 16, "sd2": 16, "sdxl": 70, "sdxl-refiner": 44, "pixart": 28}
# Made of SDXL by leaving layers out.
SMALLER = {"ssd-1b": 34, "segmind-vega": 15, "koala-700m": 21, "koala-1b": 30}


def find(model):
    from comfyui_deltaconv.nodes.host.sites import find_sites

    return find_sites(model)


@pytest.mark.parametrize("family", sorted(COUNTS.keys() - {"pixart"}))
def test_unet_sites_are_those_of_the_real_class(comfy, family):
    import comfy.utils

    class_name, config = REAL[family]
    found = find(host_model(class_name, config, "meta"))
    assert found.family == family
    assert len(found.sites) == COUNTS[family]
    assert found.dims == dict(FAMILIES[family].dims)
    assert list(found.dims) == list(FAMILIES[family].dims)
    diffusers = comfy.utils.unet_to_diffusers(config)
    names = {ours: theirs for theirs, ours in diffusers.items()}
    for site, published in published_paths(family).items():
        assert names[f"{site}.to_q.weight"] == f"{published}.attn1.to_q.weight"
        assert from_published(published, config["num_res_blocks"]) == site
        assert found.sites[site].level == resolution_level(site, config["num_res_blocks"])


# UNets that the class of SD and SDXL takes along: class, configuration, family, layers.
VARIANTS = [
    ("SD15", {**REAL["sd1"][1], "in_channels": 9}, "sd1", 16),
    ("SD15_instructpix2pix", {**REAL["sd1"][1], "in_channels": 8}, "sd1", 16),
    ("SDXL_instructpix2pix", {**REAL["sdxl"][1], "in_channels": 8}, "sdxl", 70),
    ("LotusD", {**REAL["sd2"][1], "num_classes": "sequential", "adm_in_channels": 4}, "sd2", 16),
    ("SVD_img2vid", REAL["svd"][1], "svd", 16),
    *((*REAL[name], name, layers) for name, layers in SMALLER.items()),
]


@pytest.mark.any_comfyui
@pytest.mark.parametrize(("class_name", "config", "family", "layers"), VARIANTS)
def test_variants_are_of_their_family(comfy, class_name, config, family, layers):
    found = find(host_model(class_name, config, "meta"))
    assert (found.family, len(found.sites)) == (family, layers)
    assert list(found.dims.items()) == list(FAMILIES[family].dims.items())
    depth = FAMILIES[family].num_res_blocks
    assert all(found.sites[site].level == resolution_level(site, depth) for site in found.sites)


@pytest.mark.any_comfyui
@pytest.mark.parametrize("family", ["svd", "ssd-1b", "koala-700m"])
def test_blocks_stand_in_variants_and_leave_without_a_trace(as_comfyui_runs_nodes, family):
    """Of a video every frame is a map of its own; maps that are not square."""
    import comfy.sample
    import patched_models

    class_name, config = REAL[family]
    # SVD's heads have 64 channels.
    config = {**config, "model_channels": 64 if family == "svd" else 32, "context_dim": 16}
    model = randomize(host_model(class_name, config), 0.1)
    found = find(model)
    blocks = {site: DeltaConvBlock(dim, 3) for site, dim in found.dims.items()}
    weights = weights_of_blocks(blocks)
    frames = 3 if family == "svd" else 1
    latent = torch.zeros(frames, 4, 16, 24)
    torch.manual_seed(2)
    more = {"pooled_output": torch.randn(1, 1280)}
    condition = [[torch.randn(1, 4, 16), more]]

    def sample(model):
        noise = comfy.sample.prepare_noise(latent, 1)
        arguments = (1, 1.0, "euler", "normal", condition, condition, latent)
        return comfy.sample.sample(model, noise, *arguments, seed=1)

    stock = sample(model)
    patched, report = patched_models.apply(model, weights)
    assert f"{len(found.sites)} of {len(found.sites)}" in report
    seen = []
    (attached,) = patched.get_additional_models_with_key("deltaconv")
    for number, block in enumerate(attached.model.blocks):
        block.register_forward_pre_hook(
            lambda _, x, site=found.sites[attached.model.sites[number]].path: seen.append(
                (tuple(x[0].shape[1:3]) == found.map_size(site, 16, 24), len(x[0]) % frames)
            )
        )
    student = sample(patched)
    assert student.isfinite().all() and not torch.equal(student, stock)
    assert len(seen) == len(found.sites) and set(seen) == {(True, 0)}
    assert torch.equal(sample(model), stock)


@pytest.mark.parametrize("class_name", ["PixArtSigma", "PixArtAlpha"])
def test_pixart_sites_are_those_of_the_real_class(comfy, class_name):
    found = find(host_model(class_name, REAL["pixart"][1], "meta"))
    assert found.family == "pixart"
    assert found.dims == dict(FAMILIES["pixart"].dims)
    for site, published in published_paths("pixart").items():
        assert published == f"transformer_blocks.{site.split('.')[1]}"
        assert from_published(published) == site
    assert found.map_size("blocks.0.attn", 64, 96) == (32, 48)


def test_map_sizes_are_those_of_the_real_unet(comfy):
    """Odd latents round up at every downsampler."""
    import comfy.ldm.modules.attention as attention

    model = host_model("SD15", {**REAL["sd1"][1], "model_channels": 32})
    found, seen = find(model), {}
    for path, module in model.model.diffusion_model.named_modules():
        if isinstance(module, attention.SpatialTransformer):
            site = f"{path}.transformer_blocks.0.attn1"

            def note(module, arguments, site=site):
                seen[site] = tuple(arguments[0].shape[-2:])

            module.register_forward_pre_hook(note)
    x, context = torch.zeros(1, 4, 49, 70), torch.zeros(1, 77, 768)
    with torch.no_grad():
        model.model.diffusion_model(x, torch.zeros(1), context=context)
    assert seen == {site: found.map_size(site, 49, 70) for site in found.sites}


def test_families_without_published_blocks_have_no_published_names():
    others = [name for name, family in FAMILIES.items() if not family.num_res_blocks]
    others.remove("pixart")
    assert len(others) == 10
    for family in others:
        assert not any(map(to_published, FAMILIES[family].dims))


@pytest.mark.parametrize("family", COUNTS)
def test_paths_map_there_and_back(family):
    for site, published in published_paths(family).items():
        assert to_published(site) == published
        assert from_published(published) == site
    assert families_of(FAMILIES[family].dims)[0].dims == FAMILIES[family].dims


@pytest.mark.parametrize(
    "path",
    [
        "input_blocks.0.0",
        "input_blocks.3.1.transformer_blocks.0.attn1",
        "output_blocks.99.1.transformer_blocks.0.attn1",
        "input_blocks.99.1.transformer_blocks.0.attn1",
        "input_blocks.1.1.transformer_blocks.0.attn2",
        "",
    ],
)
def test_other_paths_have_no_published_name(path):
    assert to_published(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "down_blocks.0.attentions.2.transformer_blocks.0",
        "up_blocks.0.attentions.3.transformer_blocks.0",
        "down_blocks.4.attentions.0.transformer_blocks.0",
        "mid_block.attentions.1.transformer_blocks.0",
        "blocks.3",
        "",
    ],
)
def test_other_published_paths_have_no_site(path):
    assert from_published(path) is None


def test_native_sizes():
    assert native_latent("sdxl") == 128
    assert native_latent(demo.FAMILY) == demo.NATIVE_SIZE
    assert native_latent("") == native_latent("a family of a user's own") == 64


def test_published_kernels_are_those_of_the_paper():
    sd1 = [FAMILIES["sd1"].published_kernel(site) for site in FAMILIES["sd1"].dims]
    assert sd1 == [7, 7, 9, 9, 5, 5, 3, 5, 5, 5, 9, 9, 9, 11, 11, 11]
    sdxl = [FAMILIES["sdxl"].published_kernel(site) for site in FAMILIES["sdxl"].dims]
    assert sdxl == [9] * 4 + [7] * 20 + [9] * 10 + [9] * 30 + [13] * 6
    assert {FAMILIES["pixart"].published_kernel(f"blocks.{i}.attn") for i in range(28)} == {13}
    assert FAMILIES["sd2"].published_kernel("middle_block.1.transformer_blocks.0.attn1") is None


def weights_for(dims, **description):
    blocks = {site: DeltaConvBlock(dim, 3, device="meta") for site, dim in dims.items()}
    return weights_of_blocks(blocks, **description)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_fit_their_own_family(family):
    weights = weights_for(FAMILIES[family].dims)
    assert family in weights.families
    check_fit(weights, FAMILIES[family].dims, family)


def test_sd1_and_sd2_share_a_layout_unless_the_file_says():
    weights = weights_for(FAMILIES["sd1"].dims)
    assert weights.families == ("sd1", "sd2", "svd")
    check_fit(weights, FAMILIES["sd2"].dims, "sd2")
    with pytest.raises(WeightsError, match=r"for Stable Diffusion 2\.x.* for Stable Diffusion 1"):
        check_fit(weights_for(FAMILIES["sd1"].dims, family="sd1"), FAMILIES["sd2"].dims, "sd2")


def test_models_of_equal_layers_keep_to_the_family_that_the_file_names():
    weights = weights_for(FAMILIES["anima"].dims)
    assert set(weights.families) == {"anima", "cosmos-predict2"}
    named = weights_for(FAMILIES["anima"].dims, family="anima")
    check_fit(named, FAMILIES["anima"].dims, "anima")
    with pytest.raises(WeightsError, match=r"for Cosmos-Predict2 2B, .* for Anima\. Load"):
        check_fit(named, FAMILIES["cosmos-predict2"].dims, "cosmos-predict2")


@pytest.mark.parametrize("family", ["hunyuandit", "wan-14b", "kandinsky5-image", "ltxv-2b"])
def test_a_file_for_another_family_is_refused_by_name(family):
    other = "wan-1.3b" if family == "wan-14b" else "anima"
    with pytest.raises(WeightsError) as error:
        check_fit(weights_for(FAMILIES[other].dims), FAMILIES[family].dims, family)
    for name in (family, other):
        assert FAMILIES[name].title in str(error.value)


def test_another_family_is_named_on_both_sides():
    weights = weights_for(FAMILIES["sdxl"].dims, source="xl.safetensors")
    with pytest.raises(WeightsError) as error:
        check_fit(weights, FAMILIES["sd1"].dims, "sd1")
    for words in ("Stable Diffusion 1.x", "Stable Diffusion XL", "xl.safetensors"):
        assert words in str(error.value)


def test_missing_layers_and_wrong_widths_are_named():
    weights = weights_for({"blocks.0.attn": 8, "blocks.1.attn": 8})
    with pytest.raises(WeightsError, match=r"layers it does not have \(blocks\.1\.attn\)"):
        check_fit(weights, {"blocks.0.attn": 8}, "")
    with pytest.raises(WeightsError, match=r"blocks\.1\.attn: 8 channels, the model has 16"):
        check_fit(weights, {"blocks.0.attn": 8, "blocks.1.attn": 16}, "")


def test_the_demo_weights_fit_no_stock_model():
    from comfyui_deltaconv.deltaconv import demo

    with pytest.raises(WeightsError, match="emoji-demo"):
        check_fit(read_weights(demo.DELTACONV_PATH), FAMILIES["sd1"].dims, "sd1")


LEVELS = {site: resolution_level(site) for site in FAMILIES["sd1"].dims}


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        ("all", 16),
        ("", 16),
        ("level 0", 5),
        ("level 1", 5),
        ("level 2", 5),
        ("level 3", 1),
        ("middle", 1),
        ("down", 6),
        ("up", 9),
        ("down, middle\nup", 16),
        ("-middle", 15),
        ("all, -up, -level0", 5),
        ("output_blocks.3.*", 1),
        ("*.attn1, -input_blocks.?.1.*", 10),
    ],
)
def test_selections(selection, count):
    chosen = select_sites(LEVELS, selection)
    assert len(chosen) == count
    assert chosen == [site for site in LEVELS if site in set(chosen)]


@pytest.mark.parametrize("selection", ["level 4", "attn9", "down, foo", "-foo"])
def test_selections_that_name_nothing_are_refused(selection):
    with pytest.raises(ValueError, match="names none of them"):
        select_sites(LEVELS, selection)


def test_selections_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="leaves none"):
        select_sites(LEVELS, "all, -all")
