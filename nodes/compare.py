"""Compare two batches of pictures."""

from comfy_api.latest import io

from ..deltaconv.pictures.metrics import compare, side_by_side
from .node import Node
from .sockets import CATEGORY


class DeltaConvCompare(Node):
    """Two IMAGE batches → one labelled picture, PSNR and SSIM as text and numbers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvCompare",
            display_name="Compare Pictures (PSNR, SSIM)",
            category=CATEGORY,
            description="Put two batches of pictures side by side and measure how far apart they "
            "are: PSNR in dB and SSIM, pair by pair and on average.",
            search_aliases=["psnr", "ssim", "side by side", "A/B"],
            inputs=[
                io.Image.Input("images_a", tooltip="Drawn as it was, say with self-attention."),
                io.Image.Input("images_b", tooltip="As many, of the same size, drawn otherwise."),
                io.String.Input(
                    "label_a", default="self-attention", tooltip="Written above images_a."
                ),
                io.String.Input("label_b", default="DeltaConv", tooltip="Written above images_b."),
            ],
            outputs=[
                io.Image.Output(display_name="side_by_side"),
                io.String.Output(display_name="report"),
                io.Float.Output(
                    display_name="psnr", tooltip="Mean over the pairs in dB; inf when identical."
                ),
                io.Float.Output(
                    display_name="ssim", tooltip="Mean over the pairs; NaN without kornia."
                ),
            ],
        )

    @classmethod
    def execute(cls, images_a, images_b, label_a: str, label_b: str) -> io.NodeOutput:
        result = compare(images_a, images_b)
        captions = [result.caption(index) for index in range(len(result.psnr))]
        sheet = side_by_side(images_a, images_b, label_a, label_b, captions)
        ssim = float("nan") if result.mean_ssim is None else result.mean_ssim
        return io.NodeOutput(sheet, result.report(), result.mean_psnr, ssim)
