"""The distillation node: MODEL → ΔConv weights, with previews, resumable."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comfy_api.latest import io

from .sockets import CATEGORY, DeltaConv, LossMap, Recipe

if TYPE_CHECKING:
    from .host.distill_inputs import DistillInputs

KERNELS = ("published, else by size", "by size")
CHOICES = ("balanced", "faithful", "fastest")
# The widget's option → the preset whose losses it stands for.
LOSSES = {"ours": "default", "published": "paper", "authors' code (SD1.5)": "code-sd15"}


class DeltaConvDistill(io.ComfyNode):
    """MODEL → DELTACONV, LOSS_MAP and a report; saves while it runs, and resumes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        steps = {"min": 0, "max": 1_000_000}
        rate = {"min": 1e-7, "max": 1.0, "step": 1e-7}
        return io.Schema(
            node_id="DeltaConvDistill",
            display_name="Distill ΔConv",
            category=CATEGORY,
            description="Distill the self-attention of a model into ΔConvBlocks: first by least "
            "squares, then layer by layer, then as a whole. Train on latents with conditioning, or "
            "on prompts alone, for which the model's own samples are drawn. It saves as it goes; "
            "queue it again with the same folder to go on.",
            search_aliases=["ConvFusion training", "distil", "train deltaconv"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The teacher, with its LoRAs if it has any."),
                Recipe.Input(
                    "recipe",
                    optional=True,
                    tooltip="Which layers to replace, with which kernel; none: all, by the preset.",
                ),
                io.Combo.Input("kernels", options=list(KERNELS), default=KERNELS[0]),
                io.Latent.Input(
                    "latents", optional=True, tooltip="Images to train on, as core's trainers take."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="One caption for all latents, or one per latent. Without latents: "
                    "what to draw samples from.",
                ),
                io.Conditioning.Input(
                    "unconditional",
                    optional=True,
                    tooltip="The empty prompt. Without it no image is trained unconditionally.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One per line; used where no positive conditioning is connected.",
                ),
                io.Int.Input("layer_steps", default=300, **steps),
                io.Int.Input(
                    "joint_steps",
                    default=300,
                    tooltip="Steps of the whole student against the teacher. Needs memory for a "
                    "backward pass through the model, and ComfyUI 0.30.0 or newer.",
                    **steps,
                ),
                io.Int.Input("batch_size", default=8, min=1, max=4096),
                io.Float.Input("layer_rate", default=1e-3, **rate),
                io.Float.Input("joint_rate", default=3e-4, **rate),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    # A new seed at every run would resume under other settings.
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the training. Own samples have one of their own: going on under "
                    "another seed draws none anew.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Name of a folder in output/deltaconv/distillation: one that holds a "
                    "distillation of this model is gone on with. Empty: a new number, which the "
                    "node shows.",
                ),
                io.Int.Input("save_every", default=100, min=1, max=1_000_000, advanced=True),
                io.Int.Input(
                    "preview_every",
                    default=100,
                    min=0,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Steps between preview pictures of teacher and student; 0: none.",
                ),
                io.Combo.Input(
                    "losses",
                    options=list(LOSSES),
                    default="ours",
                    advanced=True,
                    tooltip="Of the joint stage. published: the three that the paper states. "
                    "authors' code (SD1.5): the features alone, because nothing else has a "
                    "gradient in the authors' code for SD1.5.",
                ),
                io.Combo.Input(
                    "initialisation",
                    options=["informed", "random"],
                    default="informed",
                    advanced=True,
                ),
                io.Combo.Input(
                    "precision",
                    options=["float32", "bfloat16", "float16"],
                    default="float32",
                    advanced=True,
                    tooltip="Of the blocks' computation; their master weights are float32.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Joint stage: recompute the model's activations to save memory.",
                ),
                io.Int.Input("accumulate", default=1, min=1, max=4096, advanced=True),
                io.Int.Input(
                    "samples",
                    default=64,
                    min=1,
                    max=100_000,
                    advanced=True,
                    tooltip="How many own samples to draw where there are no latents.",
                ),
                io.Int.Input(
                    "sample_size",
                    default=0,
                    min=0,
                    max=16384,
                    advanced=True,
                    tooltip="Latent height and width of own samples; 0: the family's usual size.",
                ),
                DeltaConv.Input(
                    "start",
                    optional=True,
                    tooltip="Weights to go on from in place of an initialization, say to bake a "
                    "LoRA into them. Without a recipe their layers and kernels are kept.",
                ),
                io.Float.Input(
                    "min_snr",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    optional=True,
                    advanced=True,
                    tooltip="Joint stage: γ of Min-SNR weighting, 5 is usual; 0 leaves it out.",
                ),
                io.Boolean.Input(
                    "eight_bit",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the optimizer's moments in 8 bits; needs bitsandbytes.",
                ),
                io.Int.Input(
                    "samples_mb",
                    default=1024,
                    min=1,
                    max=10_000_000,
                    optional=True,
                    advanced=True,
                    tooltip="Most megabytes that own samples may take on disk.",
                ),
                io.Combo.Input(
                    "choice",
                    options=list(CHOICES),
                    default=CHOICES[0],
                    optional=True,
                    tooltip="Which layers and steps get blocks where no recipe is connected; the "
                    "others keep attention and are not trained. balanced: the least error that "
                    "saves 60% of the time that blocks everywhere save. faithful: 30%. fastest: "
                    "every layer, every step.",
                ),
            ],
            outputs=[
                DeltaConv.Output(display_name="deltaconv"),
                LossMap.Output(display_name="loss_map"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, model, latents=None, positive=None, **inputs) -> io.NodeOutput:
        # Imported here: training is large, and importing the pack stays quick.
        from .host.distillation import run

        return io.NodeOutput(*run(model[0], latents or [], positive or [], read_inputs(inputs)))


def read_inputs(lists: Mapping[str, Sequence]) -> "DistillInputs":
    """Input name → list of values, the first of which counts, to the inputs as the host reads them.

    Latents and their conditionings alone are lists by meaning, and stand apart.
    """
    from .host.distill_inputs import DistillInputs

    given = {name: v[0] for name, v in lists.items() if v and v[0] is not None}
    preset, published = LOSSES[given.pop("losses")], given.pop("kernels") == KERNELS[0]
    return DistillInputs(preset=preset, published=published, **given)
