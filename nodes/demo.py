"""The packaged demo model and its text encoder, as nodes."""

from comfy_api.latest import io

from ..deltaconv import demo, read_weights
from .host.demo_model import NODE, load_demo_model, tell_times
from .host.messages import say
from .host.node_text import running_node, show_on_node
from .node import Node
from .sockets import CATEGORY, DeltaConv


class DeltaConvDemoModel(Node):
    """The packaged teacher and the ΔConv weights distilled from it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="ΔConv Demo Model",
            category=CATEGORY,
            description="A tiny emoji text-to-image model that comes with this pack, and ΔConv "
            "weights distilled from it: everything runs on a CPU, and nothing is downloaded. Use "
            "it with ΔConv Demo Prompt, an empty 64 × 64 Chroma Radiance latent and the "
            "pixel_space VAE.",
            search_aliases=["ConvFusion demo", "emoji"],
            inputs=[],
            outputs=[io.Model.Output(), DeltaConv.Output(display_name="deltaconv")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model = load_demo_model()
        tell_times(model, running_node())
        return io.NodeOutput(model, read_weights(demo.DELTACONV_PATH))


class DeltaConvDemoPrompt(Node):
    """Text → CONDITIONING of the demo model, and what it could not read."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvDemoPrompt",
            display_name="ΔConv Demo Prompt",
            category=CATEGORY,
            description="Encode a prompt for the ΔConv Demo Model. It knows the words of Unicode "
            "emoji names; the report names those it does not know. Empty text is the "
            "unconditional prompt.",
            search_aliases=["ConvFusion demo prompt"],
            inputs=[
                io.String.Input(
                    "text",
                    default="red apple",
                    multiline=True,
                    tooltip="The name of an emoji, as the demo model learned them.",
                )
            ],
            outputs=[io.Conditioning.Output(), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        encoder = demo.text_encoder()
        report = encoder.report(text)
        show_on_node(encoder.report(text, say))
        return io.NodeOutput([[encoder.encode(text), {}]], report)
