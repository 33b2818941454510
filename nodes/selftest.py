"""Compare the kernels with their definition on ComfyUI's device."""

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from .node import Node
from .sockets import CATEGORY


class DeltaConvSelfTest(Node):
    """Nothing → a report: which dtypes and kernel sizes may be trusted on this device."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvSelfTest",
            display_name="ΔConv Self-Test",
            category=CATEGORY,
            description="Compare the computation of ΔConvBlocks with its definition on your own "
            "device, forward and backward, and say for every dtype and kernel size whether it may "
            "be trusted.",
            search_aliases=["kernel test", "wrong results", "triton check"],
            is_output_node=True,
            inputs=[
                io.Float.Input(
                    "seconds",
                    default=30.0,
                    min=1.0,
                    max=3600.0,
                    step=1.0,
                    tooltip="No test is begun after this; the report says what was left out.",
                )
            ],
            outputs=[io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, seconds: float = 30.0) -> io.NodeOutput:
        # Import here: importing the pack stays quick.
        from ..kernels.device import device_name
        from ..kernels.selftest import report, self_test

        device = comfy.model_management.get_torch_device()
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        try:
            verdicts = list(self_test(device, seconds, progress))
        finally:
            comfy.model_management.soft_empty_cache()
        heading = f"ΔConv self-test on {device_name(device)}, torch {torch.__version__}"
        text = f"{heading}\n\n{report(verdicts)}"
        return io.NodeOutput(text, ui=ui.PreviewText(text))
