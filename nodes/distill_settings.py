"""Everything about a distillation that most need not set, on a node of its own."""

from comfy_api.latest import io

from .host.distill_options import INITIALIZATIONS, KERNELS, LOSSES, PRECISIONS, DistillOptions
from .node import Node
from .sockets import CATEGORY, DeltaConv, DistillSettings, Recipe

_DEFAULT = DistillOptions()


class DeltaConvDistillSettings(Node):
    """Inputs → DELTACONV_DISTILL_SETTINGS for the distillation node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvDistillSettings",
            display_name="ΔConv Distillation Settings",
            category=CATEGORY,
            description="What Distill ΔConv may be told beyond its own inputs: which layers, from "
            "which weights, how many steps at which rate, with which losses, on how many samples. "
            "Without this node it takes the values that stand here at first.",
            search_aliases=["distillation settings", "ConvFusion training settings"],
            is_input_list=True,
            inputs=[*cls._sockets(), *cls._training(), *cls._data()],
            outputs=[DistillSettings.Output(display_name="settings")],
        )

    @classmethod
    def _sockets(cls) -> list[io.Input]:
        return [
            Recipe.Input(
                "recipe",
                optional=True,
                tooltip="Which layers to replace, with which kernel; none: those that the choice "
                "finds.",
            ),
            DeltaConv.Input(
                "start",
                optional=True,
                tooltip="Weights to go on from in place of an initialization, say to bake a LoRA "
                "into them. Without a recipe their layers and kernels are kept.",
            ),
            io.Conditioning.Input(
                "positive",
                optional=True,
                tooltip="In place of prompts: one caption for all latents, or one per latent. "
                "Without latents: what to draw samples from.",
            ),
            io.Conditioning.Input(
                "unconditional",
                optional=True,
                tooltip="The empty prompt, where no CLIP encodes it. Without either no image is "
                "trained unconditionally.",
            ),
        ]

    @classmethod
    def _training(cls) -> list[io.Input]:
        steps = {"min": 0, "max": 1_000_000}
        rate = {"min": 1e-7, "max": 1.0, "step": 1e-7}
        return [
            io.Combo.Input(
                "kernels",
                options=list(KERNELS),
                default=_DEFAULT.kernels,
                tooltip="Of layers without a recipe: those of the published weights for this kind "
                "of model, or 11, 9 and 7 from the largest map to the smallest. 5 and pooled "
                "tokens: small kernels beside an attention over 64 means of the map, a kind of "
                "block of our own that came closer to the demo model; for SD1.x, SD2.x and SDXL.",
            ),
            io.Int.Input(
                "layer_steps",
                default=_DEFAULT.layer_steps,
                tooltip="Steps of each block against its own layer, where minutes is 0.",
                **steps,
            ),
            io.Int.Input(
                "joint_steps",
                default=_DEFAULT.joint_steps,
                tooltip="Steps of the whole student against the teacher, where minutes is 0. Needs "
                "memory for a backward pass through the model, and ComfyUI 0.30.0 or newer.",
                **steps,
            ),
            io.Int.Input(
                "batch_size",
                default=_DEFAULT.batch_size,
                min=1,
                max=4096,
                tooltip="Images per step.",
            ),
            io.Float.Input(
                "layer_rate",
                default=_DEFAULT.layer_rate,
                tooltip="Learning rate of the layer steps, at its highest.",
                **rate,
            ),
            io.Float.Input(
                "joint_rate",
                default=_DEFAULT.joint_rate,
                tooltip="Learning rate of the joint steps, at its highest.",
                **rate,
            ),
            io.Int.Input(
                "seed",
                default=_DEFAULT.seed,
                min=0,
                max=2**63 - 1,
                # A new seed at every run would resume under other settings.
                control_after_generate=io.ControlAfterGenerate.fixed,
                tooltip="Of the training. Own samples have one of their own: going on under "
                "another seed draws none anew.",
            ),
            io.Combo.Input(
                "losses",
                options=list(LOSSES),
                default=_DEFAULT.losses,
                advanced=True,
                tooltip="Of the joint stage. published: the three that the paper states. authors' "
                "code (SD1.5): the features alone, because nothing else has a gradient in the "
                "authors' code for SD1.5.",
            ),
            io.Float.Input(
                "min_snr",
                default=_DEFAULT.min_snr,
                min=0.0,
                max=100.0,
                advanced=True,
                tooltip="Joint stage: γ of Min-SNR weighting, 5 is usual; 0 leaves it out.",
            ),
            io.Combo.Input(
                "initialization",
                options=list(INITIALIZATIONS),
                default=_DEFAULT.initialization,
                advanced=True,
                tooltip="informed: by least squares on the teacher's own layers, before any step. "
                "random: as the published weights began.",
            ),
            io.Combo.Input(
                "precision",
                options=list(PRECISIONS),
                default=_DEFAULT.precision,
                advanced=True,
                tooltip="Of the blocks' computation; their master weights are float32.",
            ),
            io.Boolean.Input(
                "gradient_checkpointing",
                default=_DEFAULT.gradient_checkpointing,
                advanced=True,
                tooltip="Joint stage: recompute the model's activations to save memory.",
            ),
            io.Int.Input(
                "accumulate",
                default=_DEFAULT.accumulate,
                min=1,
                max=4096,
                advanced=True,
                tooltip="Parts that a batch is computed in, to save memory.",
            ),
            io.Boolean.Input(
                "eight_bit",
                default=_DEFAULT.eight_bit,
                advanced=True,
                tooltip="Keep the optimizer's moments in 8 bits; needs bitsandbytes.",
            ),
        ]

    @classmethod
    def _data(cls) -> list[io.Input]:
        return [
            io.Int.Input(
                "samples",
                default=_DEFAULT.samples,
                min=1,
                max=100_000,
                advanced=True,
                tooltip="How many own samples to draw where there are no latents; within a time in "
                "minutes at most so many.",
            ),
            io.Int.Input(
                "sample_size",
                default=_DEFAULT.sample_size,
                min=0,
                max=16384,
                advanced=True,
                tooltip="Latent height and width of own samples; 0: the family's usual size.",
            ),
            io.Int.Input(
                "samples_mb",
                default=_DEFAULT.samples_mb,
                min=1,
                max=10_000_000,
                advanced=True,
                tooltip="Most megabytes that own samples may take on disk.",
            ),
            io.Int.Input(
                "save_every",
                default=_DEFAULT.save_every,
                min=1,
                max=1_000_000,
                advanced=True,
                tooltip="Steps between states that a distillation can go on from.",
            ),
            io.Int.Input(
                "preview_every",
                default=_DEFAULT.preview_every,
                min=0,
                max=1_000_000,
                advanced=True,
                tooltip="Steps between preview pictures of teacher and student; 0: none.",
            ),
        ]

    @classmethod
    def execute(cls, positive=None, **inputs) -> io.NodeOutput:
        # Every input is a list, because `positive` is one by meaning.
        given = {name: v[0] for name, v in inputs.items() if v and v[0] is not None}
        return io.NodeOutput(DistillOptions(positive=positive or [], **given))
