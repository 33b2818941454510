"""ControlNets and T2I-Adapters of ComfyUI's own classes, small and with random weights."""

import torch

# What a ControlNet's hint and an adapter's have more rows and columns of than the latent.
_CELL = 8


def controlled(make, start=0.0, end=1.0):
    """A conditioning as ControlNetApplyAdvanced makes it, for a case, with the control `make`s."""

    def condition(case):
        from nodes import ControlNetApplyAdvanced

        if make not in case.frozen:
            case.frozen[make] = make(case.model.model)
        generator = torch.Generator().manual_seed(5)
        rows, columns = (_CELL * size for size in case.latent.shape[-2:])
        picture = torch.rand(1, rows, columns, 3, generator=generator)
        prompts = case.positive, case.negative
        inputs = (*prompts, case.frozen[make], picture, 1.0, start, end)
        return ControlNetApplyAdvanced().apply_controlnet(*inputs)[0]

    return condition


def _random(module, scale=0.05):
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def control_net(model):
    """Of the model's own layout where it is a UNet; a small one of SD1.5's else."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops
    from host_models import REAL, SMALL

    config = dict(model.model_config.unet_config)
    if not hasattr(model.diffusion_model, "input_blocks"):
        context = config.get("caption_channels", config.get("text_dim", 32))
        config = {**REAL["sd1"][1], **SMALL["sd1"], "context_dim": context, "num_heads": 4}
        config["in_channels"] = model.latent_format.latent_channels
    for name in ("out_channels", "image_size"):
        config.pop(name, None)
    made = comfy.cldm.cldm.ControlNet(
        image_size=32, hint_channels=3, operations=comfy.ops.manual_cast, **config
    )
    cpu = torch.device("cpu")
    return comfy.controlnet.ControlNet(_random(made), load_device=cpu)


def t2i_adapter(model):
    """Of the layout that ComfyUI chooses for SDXL, and the light one else."""
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter, Adapter_light

    config = model.model_config.unet_config
    width = config.get("model_channels", 32)
    if "adm_in_channels" in config:
        channels = [width, 2 * width, 4 * width, 4 * width]
        made = Adapter(channels, 2, 3 * 16 * 16, 1, sk=True, use_conv=False, xl=True)
        return comfy.controlnet.T2IAdapter(_random(made), 3, _CELL, "nearest-exact")
    # Every third block of the demo, of a block per level, is of the next level.
    made = Adapter_light([width, 2 * width], 1, 3 * 8 * 8)
    return comfy.controlnet.T2IAdapter(_random(made), 3, _CELL // 2, "nearest-exact")
