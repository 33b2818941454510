"""What attention sees beside one map of image tokens: plain attention runs, said once, by name."""

import inspect
import logging

import patched_models as models
import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
from family_models import KINDS, TEXT, weighted
from host_models import host_model

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")


def weights_for(kind):
    torch.manual_seed(1)
    return weights_of_blocks({site: DeltaConvBlock(kind.dim, 5) for site in kind.sites})


def check(kind, model, sample, caplog, sentence):
    """Plain attention to the bit, one warning; the same model's images still run blocks."""
    stock, image = sample(model), kind.sample(model)
    patched, _ = models.apply(model, weights_for(kind))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(sample(patched), stock)
    (said,) = [r.getMessage() for r in caplog.records if "whole map" in r.getMessage()]
    assert sentence in said and "Plain attention runs where that is so" in said
    assert not torch.equal(kind.sample(patched), image)


def with_extras(kind, **extras):
    """A sampling whose conditioning has these entries beside its text."""

    def sample(model, latent=None):
        prompts = kind.prompt(), kind.prompt(3)
        for prompt in prompts:
            prompt[0][1].update(extras)
        return kind.sample(model, 2, latent, *prompts)

    return sample


def test_a_reference_image_of_wan(comfy, caplog):
    """`ref_conv` puts its tokens in front of the map's."""
    kind = KINDS["Wan"]
    config = {**kind.small, "in_dim_ref_conv": 16}
    model = weighted(host_model(kind.class_name, config))
    reference = torch.randn(1, 16, 1, 14, 18)
    sample = with_extras(kind, reference_latents=[reference])
    check(kind, model, sample, caplog, "63 tokens beside its map, of reference images or guides")


def test_context_latents_of_wan(comfy, caplog):
    """They come behind the map's tokens."""
    import comfy.conds

    kind = KINDS["Wan"]
    model = kind.build()
    if "context_latents" not in comfy.model_base.WAN21.extra_conds.__code__.co_consts:
        pytest.skip("this ComfyUI has no context latents")
    sample = with_extras(kind, context_latents=[torch.randn(1, 16, 1, 6, 4)])
    check(kind, model, sample, caplog, "6 tokens beside its map, of reference images or guides")


def test_a_guide_of_ltx_video_is_another_frame(comfy, caplog):
    from comfy.ldm.lightricks.symmetric_patchifier import latent_to_pixel_coords

    kind = KINDS["LTX-Video"]
    model = kind.build()
    _, cells = model.model.diffusion_model.patchifier.patchify(kind.latent())
    guide = latent_to_pixel_coords(cells, (8, 32, 32), True)
    mask = torch.ones(1, 1, 2, *kind.size)
    mask[:, :, 1] = 0

    def sample(model):
        guided = with_extras(kind, keyframe_idxs=guide, concat_mask=mask)
        latent = kind.latent(frames=2)
        latent[:, :, 1] = 0.5
        return guided(model, latent)

    check(kind, model, sample, caplog, "got a video of 2 frames")


def test_a_mask_of_ltx_videos_attention(comfy):
    """As its guides bring it."""
    from comfyui_deltaconv.nodes.host.sites import OTHERS, find_sites
    from comfyui_deltaconv.nodes.host.sites.base import GIVEN

    kind = KINDS["LTX-Video"]
    model = kind.build()
    found, calls = find_sites(model), []
    site = found.sites[kind.sites[0]]
    module = model.model.diffusion_model.get_submodule(site.path)
    forward = found.wrap(site, module.forward, lambda call: calls.append(call) or call.attend())
    x = torch.randn(2, 63, kind.dim)
    given = found.example_call(model.model.diffusion_model, site, x, kind.size, {})
    for mask in (None, torch.zeros(1, 1, 63, 63)):
        assert torch.equal(forward(x, mask=mask, **given), module(x, mask=mask, **given))
    seen = []
    inspected = found.inspecting(site, module, module.forward, seen.append)
    for mask in (None, torch.zeros(1, 1, 63, 63)):
        assert torch.equal(inspected(x, mask=mask, **given), module(x, mask=mask, **given))
    # q and k do not tell what a mask leaves of them.
    assert [heads.problem for heads in seen] == ["", GIVEN] and seen[1].q is None
    assert [call.problem for call in calls] == ["", OTHERS]
    assert [call.is_whole_map(kind.dim) for call in calls] == [True, False]


@pytest.mark.parametrize("name", ["Anima", "Wan"])
def test_attn1_patches_of_other_nodes(name, comfy, caplog):
    """Anima's take the input, as LLLite's do; Wan's take q, k and the result."""
    from comfy.ldm.cosmos import predict2

    kind = KINDS[name]
    model = kind.build()

    def of_anima(q, k, v, pe=None, attn_mask=None, extra_options=None):
        return {"q": 1.5 * q, "k": k, "v": v, "pe": pe}

    def of_wan(args):
        assert args["q"].shape == args["k"].shape
        return args["x"] * 1.5

    if name == "Anima" and "attn1_patch" not in inspect.getsource(predict2):
        pytest.skip("this ComfyUI has no attention patches for Anima")
    patched = model.clone()
    patched.set_model_attn1_patch(of_anima if name == "Anima" else of_wan)
    stock = kind.sample(patched)
    assert not torch.equal(stock, kind.sample(model))
    both, _ = models.apply(patched, weights_for(kind))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(kind.sample(both), stock)
    (said,) = [r.getMessage() for r in caplog.records if "whole map" in r.getMessage()]
    assert "keys, values or a mask of another node" in said


def test_context_windows_of_a_video(comfy, caplog):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    kind = KINDS["Wan"]
    model = kind.build()

    def sample(model):
        # A newer ComfyUI may add a frame to each window.
        parameters = inspect.signature(ContextWindowsManualNode.execute).parameters
        more = {name: False for name in ("causal_window_fix",) if name in parameters}
        windows = ContextWindowsManualNode.execute(
            model, 2, 1, "standard_static", 1, False, "pyramid", 2, False, **more
        ).args[0]
        return kind.sample(windows, latent=kind.latent(frames=4))

    check(kind, model, sample, caplog, "got a video of 2 frames")


def test_frames_that_wan_joins_to_its_latent(comfy, caplog):
    kind = KINDS["Wan"]
    sample = with_extras(kind, time_dim_concat=torch.randn(1, 16, 1, 13, 18))
    check(kind, kind.build(), sample, caplog, "got a video of 2 frames")


@pytest.mark.parametrize("frames", [1, 2])
def test_video_models_of_kandinsky_draw_images_with_blocks(frames, comfy, caplog):
    kind = KINDS["Kandinsky 5"]
    config = {**kind.small, "visual_embed_dim": 132}
    model = weighted(host_model("Kandinsky5", config))
    latent = torch.zeros(1, 16, frames, *kind.size)
    stock = kind.sample(model, latent=latent)
    patched, _ = models.apply(model, weights_for(kind))
    with caplog.at_level(logging.WARNING):
        student = kind.sample(patched, latent=latent)
    assert torch.equal(student, stock) == (frames == 2)
    assert ("a video of 2 frames" in caplog.text) == (frames == 2)


def test_a_backward_pass_finds_the_map_of_hunyuandit(comfy):
    """Blocks are computed again in a thread of autograd's, where nothing was noted."""
    import threading

    from comfyui_deltaconv.nodes.host.sites import find_sites

    found = find_sites(KINDS["HunyuanDiT"].build())

    def run(seen):
        seen.append(found.noted.grid)
        found.noted.grid = (1, 3, 5)
        seen.append(found.noted.grid)

    found.noted.grid = (1, 7, 9)
    seen = []
    thread = threading.Thread(target=run, args=(seen,))
    thread.start()
    thread.join()
    assert seen == [(1, 7, 9), (1, 3, 5)]
    # Another thread's model call is not this one's.
    assert found.noted.grid == (1, 7, 9)


@pytest.mark.parametrize("name", ["Anima", "Kandinsky 5"])
def test_text_modules_keep_their_attention(name, comfy):
    """Anima's `llm_adapter` and Kandinsky's text blocks have a self-attention of their own."""
    from comfyui_deltaconv.nodes.host.sites import find_sites

    kind = KINDS[name]
    model = kind.build()
    if name == "Anima":
        # Its cross-attention reads as many channels as the text modules give.
        config = {**kind.small, "crossattn_emb_channels": 1024}
        model = weighted(host_model(name, config), lambda name: "embed." not in name)
        # Large: one row for all.
        embedding = model.model.diffusion_model.llm_adapter.embed.weight
        embedding.data.copy_(torch.randn(embedding.shape[1]))
    text = "llm_adapter." if name == "Anima" else "text_transformer_blocks."
    attention = kind.path.rsplit(".", 1)[1]
    modules = dict(model.model.diffusion_model.named_modules())
    own = [path for path in modules if path.startswith(text) and path.endswith(f".{attention}")]
    assert own and not set(own) & set(find_sites(model).sites)
    patched, _ = models.apply(model, weights_for(kind))
    assert not any(text in key for key in patched.object_patches)
    results = []

    def keep(module, arguments, output):
        results[-1].append(output)

    hooks = [modules[path].register_forward_hook(keep) for path in own]
    for each in (model, patched):
        results.append([])
        prompt = kind.prompt()
        if name == "Anima":
            text = torch.randn(1, 8, 1024, generator=torch.Generator().manual_seed(1))
            prompt = [[text, {"t5xxl_ids": torch.arange(6), "t5xxl_weights": torch.ones(6)}]]
        kind.sample(each, 1, None, prompt, prompt)
    for hook in hooks:
        hook.remove()
    stock, ours = results
    assert len(stock) == len(ours) > 0
    assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))


JOINT = {
    "Flux": {
        "image_model": "flux",
        "in_channels": 16,
        "vec_in_dim": 768,
        "context_in_dim": 64,
        "hidden_size": 128,
        "mlp_ratio": 4.0,
        "num_heads": 4,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": False,
        "out_channels": 16,
        "txt_ids_dims": [],
    },
    "ZImage": {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 1,
        "n_heads": 30,
        "n_kv_heads": 30,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "cap_feat_dim": 64,
        "n_refiner_layers": 1,
        "qk_norm": True,
        "norm_eps": 1e-5,
        "ffn_dim_multiplier": 1.0,
    },
    "QwenImage": {"image_model": "qwen_image", "in_channels": 64, "num_layers": 1},
    "SD3": {
        "in_channels": 16,
        "pos_embed_scaling_factor": None,
        "input_size": None,
        "patch_size": 2,
        "depth": 2,
        "num_patches": 64,
        "pos_embed_max_size": 8,
        "adm_in_channels": 16,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": TEXT, "out_features": 128},
        },
    },
}


@pytest.mark.parametrize("name", JOINT)
def test_joint_models_are_refused_for_now(name, comfy):
    from comfyui_deltaconv.nodes.host.sites import find_sites

    model = host_model(name, dict(JOINT[name]), "meta")
    kind = type(model.model.diffusion_model).__name__
    with pytest.raises(ValueError) as error:
        find_sites(model)
    assert f"got {kind}: not yet, as its attention runs over text and image" in str(error.value)
    assert not model.object_patches


@pytest.mark.parametrize(
    ("class_name", "config", "reason"),
    [
        ("WAN21_Vace", {**KINDS["Wan"].small, "vace_layers": 1, "vace_in_dim": 96}, "control"),
        ("LTXAV", {**KINDS["LTX-Video"].small, "image_model": "ltxav"}, "sound"),
    ],
)
def test_models_with_more_than_an_image_are_refused_by_name(class_name, config, reason, comfy):
    from comfyui_deltaconv.nodes.host.sites import find_sites

    model = host_model(class_name, dict(config), "meta")
    with pytest.raises(ValueError, match=f"not yet, as .*{reason}"):
        find_sites(model)
