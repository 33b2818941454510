"""Replay a MODEL's calls as CUDA graphs."""

import comfy.model_management
from comfy_api.latest import io

from .host.messages import say
from .host.node_text import show_on_node
from .host.replay import Replays, attach_replays
from .node import Node
from .sockets import CATEGORY


class DeltaConvCudaGraph(Node):
    """MODEL → MODEL whose calls are recorded once per sampling and then replayed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvCudaGraph",
            display_name="CUDA Graph Replay",
            category=CATEGORY,
            description="Launch every call of the model at once instead of kernel by kernel. At "
            "small and middle sizes the computer's processor holds the GPU up; this takes it out "
            "of the way, with and without ΔConv. The pictures stay the same, bit for bit.",
            search_aliases=["replay model calls", "launch overhead", "faster sampling"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Any MODEL on an NVIDIA GPU, after all nodes that change it. Where a "
                    "call cannot be replayed it runs as usual, and the log says why.",
                )
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        device = comfy.model_management.get_torch_device()
        said = say("replays")
        if device.type != "cuda":
            said = say("replays not on this device", device=device.type)
        elif model.is_dynamic():
            said = say("replays not with dynamic VRAM")
        show_on_node(said)
        return io.NodeOutput(attach_replays(model, Replays()))
