"""Make a recipe of the layers to replace, from a report or from text."""

from comfy_api.latest import io

from ..deltaconv.locality.recipe import PRESETS, make_recipe, parse_recipe
from .node import Node
from .sockets import CATEGORY, Locality, Recipe


class DeltaConvRecipe(Node):
    """Report and rule, or text → recipe: per layer replace or keep, kernel, scales."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvRecipe",
            display_name="ΔConv Recipe",
            category=CATEGORY,
            description="Decide which self-attention layers to replace by ΔConvBlocks and with "
            "which kernels, from a locality report and a rule, or as text of your own.",
            search_aliases=["distillation recipe", "kernel size"],
            inputs=[
                Locality.Input("report", tooltip="From Locality of Self-Attention."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="measured",
                    tooltip="measured: kernels from each layer's receptive field. published: the "
                    "kernels the method's authors ship. budget: least sensitive layers first, "
                    "until the computation target is met.",
                ),
                io.Float.Input(
                    "computation",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For budget: computation of self-attention and blocks together, as a "
                    "fraction of the self-attention's.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="A recipe of your own, instead of the preset: lines such as "
                    "`output_blocks.5.1.transformer_blocks.0.attn1: replace kernel=9 "
                    "scales=1,1/2` or `…: keep`. Start from the text output.",
                ),
            ],
            outputs=[
                Recipe.Output(display_name="recipe"),
                io.String.Output(display_name="text"),
                io.Image.Output(
                    display_name="curve",
                    tooltip="What replacing saves and costs; needs the report's sensitivity.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, report, preset: str = "measured", computation: float = 0.5, text: str = ""
    ) -> io.NodeOutput:
        from ..deltaconv.locality.model_plots import plot_cost
        from ..deltaconv.pictures.figure import picture

        if text.strip():
            recipe = parse_recipe(text, report.sites)
        else:
            recipe = make_recipe(report, preset, computation)
        return io.NodeOutput(
            recipe, recipe.to_text(), picture(lambda: plot_cost(report, recipe), ValueError)
        )
