"""Small models of ComfyUI's own classes for Anima and Cosmos-Predict2."""

from host_models import host_model, randomize

DIM, DEPTH, TEXT = 64, 3, 32


def config(kind, **changes):
    """What ComfyUI's detection would find in a checkpoint of that size."""
    return {
        "image_model": "anima" if kind == "Anima" else "cosmos_predict2",
        "max_img_h": 240,
        "max_img_w": 240,
        "max_frames": 128,
        "in_channels": 16,
        "out_channels": 16,
        "patch_spatial": 2,
        "patch_temporal": 1,
        "model_channels": DIM,
        "num_blocks": DEPTH,
        "num_heads": 2,
        "crossattn_emb_channels": TEXT,
        "concat_padding_mask": True,
        "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True,
        "pos_emb_interpolation": "crop",
        "use_adaln_lora": True,
        "adaln_lora_dim": 8,
        "rope_h_extrapolation_ratio": 4.0,
        "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0,
        "extra_per_block_abs_pos_emb": False,
        "rope_enable_fps_modulation": False,
        **changes,
    }


def build(kind, device="cpu", **changes):
    """A MODEL of ComfyUI's own class; `device` meta has no weights."""
    made = host_model(kind, config(kind, **changes), device)
    # Anima's text modules take no part; they are large and stay untouched.
    return randomize(made, 0.15, lambda name: device != "meta" and "llm_adapter" not in name)
