"""Download ΔConv weights from Hugging Face, unless they are there."""

import logging
import time

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..deltaconv import hub, read_weights
from .host.folders import FOLDER, PUBLISHED, file_state, input_folders, models_folder
from .host.messages import say
from .host.node_text import show_on_node
from .node import Node
from .sockets import CATEGORY, DeltaConv

# In seconds, between two texts on the node.
_BETWEEN = 0.5


class DeltaConvDownload(Node):
    """A known file on Hugging Face → DELTACONV; a file that is in the folder is loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvDownload",
            display_name="Download ΔConv Weights",
            category=CATEGORY,
            description="Download ΔConv weights from Hugging Face into models/deltaconv, check "
            "and load them. What is there already is loaded without asking the network.",
            search_aliases=["ConvFusion download", "Hugging Face", "get weights"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_labels(),
                    tooltip=f"The authors' files in {PUBLISHED}, by the models they are for, and "
                    f"those that models/deltaconv/{hub.CONFIGURATION} allows. Downloaded only when "
                    "the node runs, and only once.",
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
            entry = hub.find_entry(file, models_folder())
            if not entry.filled and not hub.placed_path(entry, input_folders()):
                raise hub.not_known(entry, models_folder())
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Load again when the file was written again or removed."""
        entry = hub.find_entry(file, models_folder())
        return file_state(hub.placed_path(entry, input_folders()))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        entry = hub.find_entry(file, models_folder())
        progress = _Progress(entry)
        found = hub.find_placed(entry, input_folders(), progress)
        found = found or hub.download(entry, models_folder(), progress)
        folder_paths.filename_list_cache.pop(FOLDER, None)
        show_on_node(found.note(say))
        return io.NodeOutput(read_weights(found.path, finite=True))


def _labels() -> list[str]:
    """The entries by their labels; a wrong list of the user's leaves the packaged ones."""
    try:
        return [entry.label for entry in hub.known_entries(models_folder())]
    except ValueError as error:
        logging.warning("ΔConv: %s", error)
        return [entry.label for entry in hub.published_entries()]


class _Progress:
    """Shows bytes on the node and its bar; raises when the user interrupts."""

    def __init__(self, entry: hub.Entry):
        self.repo = entry.repo
        self.bar = comfy.utils.ProgressBar(1)
        self.next = 0.0

    def __call__(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if now < self.next and done < total:
            return
        self.next = now + _BETWEEN
        if not total:
            show_on_node(say("download asks", repo=self.repo))
            return
        self.bar.update_absolute(done, total)
        show_on_node(say("download at", done=f"{done / 1e6:.1f}", total=f"{total / 1e6:.1f}"))
