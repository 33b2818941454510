"""The packaged demo teacher as a ComfyUI MODEL."""

from typing import ClassVar

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
from comfy.patcher_extension import WrappersMP

from ...deltaconv import demo
from .messages import say
from .node_text import present_node, show_on_node
from .patch import is_patched
from .step_clock import StepClock, readable

_PREFIX = "model.diffusion_model."
_KEY = "deltaconv_demo"
# The class of the node that loads it, as saved workflows name it.
NODE = "DeltaConvDemoModel"


class EmojiDemo(comfy.supported_models_base.BASE):
    """Model configuration of the demo, which ComfyUI's detection does not know."""

    unet_extra_config: ClassVar[dict] = {}
    # Pixels are the latent: three channels, scale 1.
    latent_format = comfy.latent_formats.ChromaRadiance
    deltaconv_family = demo.FAMILY


def load_demo_model(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The teacher's MODEL, in the dtype that ComfyUI picks for this machine."""
    state = comfy.utils.load_torch_file(str(demo.TEACHER_PATH), safe_load=True)
    config = EmojiDemo(demo.unet_config())
    load_device = comfy.model_management.get_torch_device()
    parameters = comfy.utils.calculate_parameters(state, _PREFIX)
    supported = config.supported_inference_dtypes
    dtype = comfy.model_management.unet_dtype(
        model_params=parameters,
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(state, _PREFIX),
    )
    cast = comfy.model_management.unet_manual_cast(dtype, load_device, supported)
    config.set_inference_dtype(dtype, cast)
    model = config.get_model(
        state, _PREFIX, device=comfy.model_management.unet_inital_load_device(parameters, dtype)
    )
    kind = (
        comfy.model_patcher.ModelPatcher
        if disable_dynamic
        else comfy.model_patcher.CoreModelPatcher
    )
    patcher = kind(model, load_device, comfy.model_management.unet_offload_device())
    model.load_model_weights(state, _PREFIX, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_demo_model, ())
    return patcher


def tell_times(model: comfy.model_patcher.ModelPatcher, node: str) -> None:
    """Show on `node` what a step of the stock model takes, after each sampling.

    Of a model that carries ΔConvBlocks Apply ΔConv tells it.
    """

    def around_sampling(executor, *args, **kwargs):
        if is_patched(executor.class_obj.model_patcher):
            return executor(*args, **kwargs)
        clock = StepClock(lambda sigma: "stock")
        result = clock.run(executor, args, kwargs)
        seconds, now = clock.series["stock"].step, present_node(node, NODE)
        if seconds is not None and now:
            show_on_node(say("step times stock", seconds=readable(seconds)), now)
        return result

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, around_sampling)
