"""Small real models of eight families, and what ComfyUI's own nodes do to a MODEL, by name."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
from controls import control_net, controlled, t2i_adapter
from host_models import SMALL, SMALL_PIXART, host_model, randomize
from patched_models import lora_state


@dataclass
class Case:
    """A model of a family, weights of all its sites, and a sampling of it."""

    model: object
    latent: torch.Tensor
    positive: list
    negative: list
    # Part of the names of a self-attention's weights.
    attention: str = ".attn1.to_q"
    weights: object = None
    frozen: dict = field(default_factory=dict)

    def __post_init__(self):
        from comfyui_deltaconv.nodes.host.sites import find_sites

        torch.manual_seed(1)
        dims = find_sites(self.model).dims
        gate = "sigmoid" if "blocks.0.attn" in dims else "scaled"
        blocks = {site: DeltaConvBlock(dim, 5, gate=gate) for site, dim in dims.items()}
        self.weights = weights_of_blocks(blocks)

    def sample(self, model, *, positive=None, sampler="euler", steps=2, cfg=3.0, **options):
        import comfy.sample

        noise = comfy.sample.prepare_noise(self.latent, 1)
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            "simple",
            self.positive if positive is None else positive,
            self.negative,
            self.latent,
            seed=1,
            **options,
        )


def _condition(tokens, width, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    extra = {name: torch.randn(shape, generator=generator) for name, shape in more.items()}
    return [[torch.randn(1, tokens, width, generator=generator), extra]]


def sd15():
    """The packaged demo, which is trained: what nodes do to its attention shows."""
    from comfyui_deltaconv.nodes.host.demo_model import load_demo_model
    from patched_models import condition

    model, latent = load_demo_model(), torch.zeros(1, 3, 16, 16)
    return Case(model, latent, condition("red apple"), condition(""))


def sdxl():
    from host_models import REAL

    class_name, config = REAL["sdxl"]
    config = {**config, **SMALL["sdxl"]}
    model = randomize(host_model(class_name, config), 0.12)
    more = {"pooled_output": (1, 1280)}
    conditions = [_condition(8, config["context_dim"], seed, **more) for seed in (1, 2)]
    return Case(model, torch.zeros(1, 4, 16, 16), *conditions)


def pixart():
    model = randomize(host_model("PixArtSigma", SMALL_PIXART), 0.1)
    return Case(
        model, torch.zeros(1, 4, 34, 38), _condition(8, 32, 1), _condition(8, 32, 2), ".attn.qkv"
    )


def anima():
    from anima_model import TEXT, build

    model = build("Anima")
    latent = torch.zeros(1, 16, 1, 12, 16)
    return Case(model, latent, _condition(8, TEXT, 1), _condition(8, TEXT, 2), ".self_attn.q")


def _of_kind(name):
    """A case of one of the other transformers."""

    def case():
        from family_models import KINDS

        kind = KINDS[name]
        sides = (12, 16) if kind.size != kind.map_size else (6, 8)
        prompts = kind.prompt(1), kind.prompt(2)
        part = f"{kind.path.split('{}')[1]}."
        return Case(kind.build(), kind.latent(sides), *prompts, part)

    return case


FAMILIES: dict[str, Callable[[], Case]] = {
    "SD1.5-like UNet": sd15,
    "SDXL-like UNet": sdxl,
    "PixArt": pixart,
    "Anima": anima,
    **{name: _of_kind(name) for name in ("HunyuanDiT", "Wan", "Kandinsky 5", "LTX-Video")},
}


class Missing(Exception):
    """This ComfyUI does not have the node."""


def node(module: str, name: str, **inputs):
    """What a core node does to a MODEL, its other inputs at their defaults."""

    def change(case, model):
        try:
            found = importlib.import_module(module)  # noqa: TID251 (one of ComfyUI's)
        except ImportError as error:
            raise Missing(name) from error
        kind = find_node(found, name)
        if hasattr(kind, "define_schema"):
            schema = kind.define_schema()
            defaults = {entry.id: first_value(entry) for entry in schema.inputs[1:]}
            result = kind.execute(model=model, **{**defaults, **inputs})
            return result.args[0] if hasattr(result, "args") else result[0]
        types = kind.INPUT_TYPES()
        entries = {**types["required"], **types.get("optional", {})}
        defaults = {
            key: entry[1].get("default") if len(entry) > 1 else entry[0][0]
            for key, entry in entries.items()
        }
        values = {**defaults, **inputs, "model": model}
        return getattr(kind(), kind.FUNCTION)(**values)[0]

    return change


def first_value(entry):
    """What a new node's widget holds."""
    default = getattr(entry, "default", None)
    options = getattr(entry, "options", None)
    return options[0] if default is None and options else default


def find_node(module, name):
    if name in getattr(module, "NODE_CLASS_MAPPINGS", {}):
        return module.NODE_CLASS_MAPPINGS[name]
    for value in vars(module).values():
        if hasattr(value, "define_schema") and value.__module__ == module.__name__:
            if value.define_schema().node_id == name:
                return value
    raise Missing(name)


def lora_by_patch(case, model):
    """A LoRA on every self-attention, by ComfyUI's own loader."""
    import comfy.sd

    state = lora_state(model, case.attention)
    return comfy.sd.load_lora_for_models(model, None, state, 1.0, 1.0)[0]


def lora_by_bypass(case, model):
    """A LoRA on every self-attention that runs beside the weights, as LoraLoaderBypass loads it."""
    import comfy.sd

    state = lora_state(model, case.attention)
    return comfy.sd.load_bypass_lora_for_models(model, None, state, 1.0, 1.0)[0]


def attn2_patch(case, model):
    """What IP-Adapter nodes do: keys and values beside the text's, in every cross-attention."""

    def patch(n, context, value, extra_options):
        return n, torch.cat([context, context * 0.5], 1), torch.cat([value, value * 0.5], 1)

    clone = model.clone()
    clone.set_model_attn2_patch(patch)
    return clone


def attn1_patch(case, model):
    """Queries, keys and values of every self-attention, scaled before it."""

    def patch(q, k, v, extra_options):
        return q * 1.5, k, v

    clone = model.clone()
    clone.set_model_attn1_patch(patch)
    return clone


def attn1_replaced(case, model):
    """What StyleAligned nodes do: another attention in every layer of the middle."""

    def replace(q, k, v, extra_options):
        return v

    clone = model.clone()
    for place in (("middle", 0), ("output", 4), ("input", 4)):
        clone.set_model_attn1_replace(replace, *place)
    return clone


def merged(case, model):
    """Half of another model of the same kind, merged in, as ModelMergeSimple does it."""
    clone, generator = model.clone(), torch.Generator().manual_seed(3)
    other = {
        f"diffusion_model.{name}": (torch.randn(parameter.shape, generator=generator) * 0.05,)
        for name, parameter in model.model.diffusion_model.named_parameters()
        if name.endswith("weight") and parameter.ndim == 2
    }
    clone.add_patches(other, 0.5, 0.5)
    return clone


def _most(size):
    """Seven eighths, in whole patches: PixArt has a least size of its own."""
    return size * 7 // 16 * 2


def context_windows(case, model):
    """Windows over the rows of the latent, fused where they overlap: core's own tiling."""
    rows = case.latent.ndim - 2
    length = _most(case.latent.shape[rows])
    inputs = {
        "context_length": length,
        "context_overlap": length // 3,
        "dim": rows,
        "cond_retain_index_list": "",
        "causal_window_fix": False,
    }
    return node(f"{EXTRAS}context_windows", "ContextWindowsManual", **inputs)(case, model)


def tiled(case, model):
    """What Tiled Diffusion does: the model draws overlapping tiles of a step's latent in turn."""

    def wrapper(apply_model, arguments):
        x, sigma, given = arguments["input"], arguments["timestep"], arguments["c"]
        width = _most(x.shape[-1])
        drawn, count = torch.zeros_like(x), torch.zeros_like(x)
        for tile in (slice(None, width), slice(-width, None)):
            drawn[..., tile] += apply_model(x[..., tile], sigma, **given)
            count[..., tile] += 1
        return drawn / count

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


EXTRAS = "comfy_extras.nodes_"
# Name → what the node does to a MODEL.
PATCHES = {
    "LoRA, by patch": lora_by_patch,
    "LoRA, by bypass": lora_by_bypass,
    "IP-Adapter style attn2 patch": attn2_patch,
    "attn1 patch": attn1_patch,
    "attn1 replacement (StyleAligned)": attn1_replaced,
    "merge of weights": merged,
    "Perturbed-Attention Guidance": node(f"{EXTRAS}pag", "PerturbedAttentionGuidance"),
    "Self-Attention Guidance": node(f"{EXTRAS}sag", "SelfAttentionGuidance"),
    "Normalized Attention Guidance": node(f"{EXTRAS}nag", "NAGuidance"),
    "HyperTile": node(f"{EXTRAS}hypertile", "HyperTile", tile_size=32),
    "ToMe": node(f"{EXTRAS}tomesd", "TomePatchModel", ratio=0.5),
    "Deep Shrink": node(f"{EXTRAS}model_downscale", "PatchModelAddDownscale", block_number=1),
    "EasyCache": node(f"{EXTRAS}easycache", "EasyCache", reuse_threshold=3.0, start_percent=0.0),
    "LazyCache": node(f"{EXTRAS}easycache", "LazyCache", reuse_threshold=3.0, start_percent=0.0),
    "FreeU": node(f"{EXTRAS}freelunch", "FreeU"),
    "FreeU V2": node(f"{EXTRAS}freelunch", "FreeU_V2"),
    "RescaleCFG": node(f"{EXTRAS}model_advanced", "RescaleCFG"),
    "APG": node(f"{EXTRAS}apg", "APG"),
    "Skip Layer Guidance (DiT)": node(
        f"{EXTRAS}slg", "SkipLayerGuidanceDiT", double_layers="0", single_layers="0"
    ),
    "CFG-Zero*": node(f"{EXTRAS}cfg", "CFGZeroStar"),
    "CFGNorm": node(f"{EXTRAS}cfg", "CFGNorm"),
    "Mahiro": node(f"{EXTRAS}mahiro", "Mahiro"),
    "TCFG": node(f"{EXTRAS}tcfg", "TCFG"),
    "FreSca": node(f"{EXTRAS}fresca", "FreSca", freq_cutoff=2),
    "Epsilon Scaling": node(f"{EXTRAS}eps", "Epsilon Scaling"),
    "Temporal Score Rescaling": node(f"{EXTRAS}eps", "TemporalScoreRescaling"),
    "UNet self-attention multiply": node(
        f"{EXTRAS}attention_multiply", "UNetSelfAttentionMultiply", q=1.2
    ),
    "UNet cross-attention multiply": node(
        f"{EXTRAS}attention_multiply", "UNetCrossAttentionMultiply", q=1.2
    ),
    "Differential Diffusion": node(f"{EXTRAS}differential_diffusion", "DifferentialDiffusion"),
    "context windows over rows": context_windows,
    "tiles (Tiled Diffusion)": tiled,
}


def area(case):
    text, more = case.positive[0]
    half = case.latent.shape[-2] // 2, case.latent.shape[-1] // 2
    placed = {"area": (*half, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
    return [[text, {**more, **placed}], case.positive[0]]


def mask(case):
    text, more = case.positive[0]
    where = torch.zeros(1, *case.latent.shape[-2:])
    where[..., : where.shape[-1] // 2] = 1
    masked = {"mask": where, "mask_strength": 1.0, "set_area_to_bounds": False}
    return [[text * 0.5, {**more, **masked}], case.positive[0]]


def timesteps(case):
    text, more = case.positive[0]
    early = {**more, "start_percent": 0.0, "end_percent": 0.5}
    late = {**more, "start_percent": 0.5, "end_percent": 1.0}
    return [[text, early], [text * 0.5, late]]


def lengths(case):
    """Prompts of several lengths, as long ones are."""
    text, more = case.positive[0]
    return [[torch.cat([text, text * 0.5], 1), more]]


def hooked_lora(case):
    """A LoRA on every self-attention for this prompt alone, as Create Hook LoRA brings it."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora_state(case.model, case.attention), 1.0, 1.0)
    return comfy.hooks.set_hooks_for_conditioning(case.positive, hooks)


# Name → the positive conditioning of a case.
CONDITIONS = {
    "LoRA, by hook": hooked_lora,
    "ControlNet": controlled(control_net),
    "ControlNet, from 40% to 80% of sampling": controlled(control_net, 0.4, 0.8),
    "T2I-Adapter": controlled(t2i_adapter),
    "areas": area,
    "masks": mask,
    "timestep ranges": timesteps,
    "prompts of another length": lengths,
}


def inpaint(case, model):
    """Sampling within a mask."""
    where = torch.zeros(1, 1, *case.latent.shape[-2:])
    where[..., : where.shape[-1] // 2] = 1
    return case.sample(model, noise_mask=where, denoise=0.7)


def image_to_image(case, model):
    return case.sample(model, denoise=0.5)


def without_guidance(case, model):
    return case.sample(model, cfg=1.0)


def batch(case, model):
    import comfy.sample

    latent = case.latent.repeat(3, *([1] * (case.latent.ndim - 1)))
    noise = comfy.sample.prepare_noise(latent, 1)
    arguments = (2, 3.0, "euler", "simple", case.positive, case.negative, latent)
    return comfy.sample.sample(model, noise, *arguments, seed=1)


def guided(make):
    """A sampling by the guider that `make` gives of core's nodes and a case."""

    def sampling(case, model):
        return sample_by(make(case, model), case)

    return sampling


def sample_by(guider, case, steps=2):
    """What SamplerCustomAdvanced draws by a guider."""
    import comfy.sample
    import comfy.samplers

    schedule = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(schedule, "simple", steps)
    noise = comfy.sample.prepare_noise(case.latent, 1)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, case.latent, sampler, sigmas, seed=1)


def _guider(module, name, *inputs, **named):
    found = importlib.import_module(f"{EXTRAS}{module}")  # noqa: TID251 (one of ComfyUI's)
    return find_node(found, name).execute(*inputs, **named).args[0]


def basic_guider(case, model):
    return _guider("custom_sampler", "BasicGuider", model, case.positive)


def cfg_guider(case, model):
    return _guider("custom_sampler", "CFGGuider", model, case.positive, case.negative, 3.0)


def dual_cfg_guider(case, model):
    prompts = case.positive, case.negative, case.negative
    return _guider("custom_sampler", "DualCFGGuider", model, *prompts, 3.0, 2.0, "regular")


def perp_neg_guider(case, model):
    prompts = case.positive, case.negative, case.negative
    return _guider("perpneg", "PerpNegGuider", model, *prompts, 3.0, 1.0)


def dual_model_guider(case, first, second):
    """The first model draws the prompt, the second what it is held against."""
    prompts = {"positive": case.positive, "negative": case.negative}
    inputs = {"model": first, "model_negative": second, "cfg": 3.0, **prompts}
    return _guider("custom_sampler", "DualModelGuider", **inputs)


# Name → a sampling of its own.
SAMPLINGS = {
    "Basic Guider": guided(basic_guider),
    "CFG Guider": guided(cfg_guider),
    "Dual CFG Guider": guided(dual_cfg_guider),
    "Perp-Neg Guider": guided(perp_neg_guider),
    "inpainting": inpaint,
    "image to image": image_to_image,
    "CFG 1": without_guidance,
    "batch of 3": batch,
}


def six_steps(case, model):
    """Long enough for a cache to leave a step out."""
    return case.sample(model, steps=6)


# Nodes that act in such a sampling alone.
SAMPLED = {"EasyCache": six_steps, "LazyCache": six_steps, "Differential Diffusion": inpaint}
