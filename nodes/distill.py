"""The distillation node: MODEL → ΔConv weights, with previews, resumable."""

from comfy_api.latest import io

from .host.distill_options import DistillOptions
from .node import Node
from .sockets import CATEGORY, DeltaConv, DistillSettings, LossMap

CHOICES = ("balanced", "faithful", "fastest")


class DeltaConvDistill(Node):
    """MODEL → DELTACONV, LOSS_MAP and a report; saves while it runs, and resumes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvDistill",
            display_name="Distill ΔConv",
            category=CATEGORY,
            description="Distill the self-attention of a model into ΔConvBlocks: first by least "
            "squares, then layer by layer, then as a whole. Train on prompts alone, for which the "
            "model's own samples are drawn, or on latents. It saves as it goes; queue it again "
            "with the same folder to go on.",
            search_aliases=["ConvFusion training", "distil", "train deltaconv"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The teacher, with its LoRAs if it has any."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Encodes the prompts; the demo model needs none.",
                ),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="Images to train on, as core's trainers take them, in place of own "
                    "samples.",
                ),
                DistillSettings.Input(
                    "settings",
                    optional=True,
                    tooltip="From ΔConv Distillation Settings: a recipe, weights to go on from, "
                    "rates, losses and the like.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One per line: what to draw samples from. Of latents: their captions, "
                    "one for all or one each.",
                ),
                io.Combo.Input(
                    "choice",
                    options=list(CHOICES),
                    default=CHOICES[0],
                    tooltip="Which layers and steps get blocks; the others keep attention and are "
                    "not trained. balanced: the least error that saves 60% of the time that blocks "
                    "everywhere save. faithful: 30%. fastest: every layer, every step. A recipe or "
                    "weights to go on from decide it themselves.",
                ),
                io.Float.Input(
                    "minutes",
                    default=10.0,
                    min=0.0,
                    max=100_000.0,
                    step=0.5,
                    tooltip="How long it may take in all: samples, initialization and steps are "
                    "planned to fit, from the pace that this device shows. Queued again with the "
                    "folder of a run that is done, it trains so long again. 0: the steps of the "
                    "settings.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Name of a folder in output/deltaconv/distillation: one that holds a "
                    "distillation of this model is gone on with. Empty: a new number, which the "
                    "node shows.",
                ),
            ],
            outputs=[
                DeltaConv.Output(display_name="deltaconv"),
                LossMap.Output(display_name="loss_map"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        prompts=("",),
        choice=("fastest",),
        minutes=(0.0,),
        folder=("",),
        clip=(None,),
        latents=None,
        settings=None,
    ) -> io.NodeOutput:
        # Imported here: training is large, and importing the pack stays quick.
        from .host.distill_inputs import DistillInputs
        from .host.distillation import run

        # Every input is a list; the latents alone are one by meaning.
        inputs = DistillInputs(
            options=settings[0] if settings else DistillOptions(),
            latents=latents or [],
            prompts=prompts[0],
            choice=choice[0],
            minutes=float(minutes[0]),
            folder=folder[0],
            clip=clip[0] if clip else None,
        )
        return io.NodeOutput(*run(model[0], inputs))
