"""Load ΔConv weights from a file, and save them to one."""

import os

import folder_paths
from comfy_api.latest import io

from ..deltaconv import read_weights, write_weights
from .host.folders import FOLDER, PUBLISHED, file_state, find_file, offered_files, output_folder
from .host.messages import say
from .host.node_text import show_on_node
from .node import Node
from .sockets import CATEGORY, DeltaConv


class DeltaConvLoad(Node):
    """A file of the folder `deltaconv` → DELTACONV; its blocks are checked, not kept in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvLoad",
            display_name="Load ΔConv Weights",
            category=CATEGORY,
            description="Load ΔConv weights, published or your own, from models/deltaconv or "
            "output/deltaconv.",
            search_aliases=["ConvFusion", "DeltaConvFusion", "convolution instead of attention"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=offered_files(),
                    tooltip="A .safetensors file in models/deltaconv (or a folder that "
                    "extra_model_paths.yaml names deltaconv) or in output/deltaconv. Published "
                    f"ones are on Hugging Face, in {PUBLISHED}.",
                )
            ],
            outputs=[DeltaConv.Output(display_name="deltaconv")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = "") -> bool | str:
        # The name comes over a link and is not known yet.
        if file is None:
            return True
        try:
            # The header alone is read here.
            read_weights(find_file(file))
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Load again when the file was written again."""
        return file_state(find_file(file))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(read_weights(find_file(file), finite=True))


class DeltaConvSave(Node):
    """DELTACONV → a numbered file in output/deltaconv, and its name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvSave",
            display_name="Save ΔConv Weights",
            category=CATEGORY,
            description="Save ΔConv weights to output/deltaconv, from where Load ΔConv Weights "
            "offers them; numbered, never overwriting.",
            search_aliases=["ConvFusion save"],
            is_output_node=True,
            inputs=[
                DeltaConv.Input("deltaconv", tooltip="The weights to save."),
                io.String.Input(
                    "filename_prefix",
                    default="deltaconv",
                    tooltip="Start of the file name below output/deltaconv; subfolders and "
                    "%year%, %month%, %day% … work as in core's save nodes.",
                ),
            ],
            outputs=[io.String.Output(display_name="file")],
        )

    @classmethod
    def execute(cls, deltaconv, filename_prefix: str) -> io.NodeOutput:
        base = output_folder()
        os.makedirs(base, exist_ok=True)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, base
        )
        while True:
            file = f"{name}_{counter:05}_.safetensors"
            try:
                write_weights(deltaconv, os.path.join(folder, file))
                break
            except FileExistsError:
                # Another ComfyUI took the number meanwhile.
                counter += 1
        folder_paths.filename_list_cache.pop(FOLDER, None)
        saved = os.path.join(subfolder, file)
        show_on_node(say("saved", file=saved, folder="output/deltaconv"))
        return io.NodeOutput(saved)
