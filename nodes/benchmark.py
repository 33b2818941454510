"""Benchmark a model with ΔConv weights on the user's device."""

from comfy_api.latest import io, ui

from .node import Node
from .sockets import CATEGORY, DeltaConv


class DeltaConvBenchmark(Node):
    """MODEL, DELTACONV and sizes → table and plot of step times, attention against ΔConv."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvBenchmark",
            display_name="Benchmark ΔConv",
            category=CATEGORY,
            description="Time one step of a model with its self-attention and with ΔConvBlocks, at "
            "several sizes, on your own device. The model is left as it was.",
            search_aliases=["speed test", "step time", "ConvFusion benchmark"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="With or without ΔConv applied."),
                DeltaConv.Input("deltaconv", tooltip="The weights whose blocks are timed."),
                io.String.Input(
                    "sizes",
                    default="",
                    tooltip="Picture sizes in pixels, such as 512, 1024 or 768x1344. Empty: the "
                    "family's usual size and twice that.",
                ),
                io.Int.Input(
                    "batch",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="Guidance runs the positive and the negative prompt in one batch, so "
                    "that one picture is a batch of 2.",
                ),
                io.Int.Input(
                    "repeats",
                    default=10,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="Rounds at each size, in which attention and ΔConv take turns.",
                ),
                io.Float.Input(
                    "seconds",
                    default=15.0,
                    min=0.1,
                    max=3600.0,
                    step=0.1,
                    advanced=True,
                    tooltip="No further round begins at a size after this; a step that takes this "
                    "long by itself is timed once.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="table"),
                io.Image.Output(display_name="plot"),
            ],
        )

    @classmethod
    def validate_inputs(cls, sizes: str | None = None) -> bool | str:
        from ..deltaconv.application.step_times import parse_sizes

        try:
            parse_sizes(sizes or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model,
        deltaconv,
        sizes: str = "",
        batch: int = 2,
        repeats: int = 10,
        seconds: float = 15.0,
    ) -> io.NodeOutput:
        # Imported here: plots and samplers would slow down the start of ComfyUI.
        from ..deltaconv.application.step_times import parse_sizes, plot, table
        from ..deltaconv.pictures.figure import picture
        from .host.benchmark import benchmark

        chosen = parse_sizes(sizes)
        heading, results = benchmark(model, deltaconv, chosen, batch, repeats, seconds)
        text = f"{heading}\n\n{table(results)}"
        image = picture(lambda: plot(results, heading), ValueError)
        return io.NodeOutput(text, image, ui=ui.PreviewText(text))
