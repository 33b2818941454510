"""The extension that ComfyUI loads: the list of nodes, and their folders."""

from comfy_api.latest import ComfyExtension, io

from .apply import DeltaConvApply
from .benchmark import DeltaConvBenchmark
from .choose import DeltaConvChoose
from .compare import DeltaConvCompare
from .cuda_graph import DeltaConvCudaGraph
from .demo import DeltaConvDemoModel, DeltaConvDemoPrompt
from .distill import DeltaConvDistill
from .distill_settings import DeltaConvDistillSettings
from .download import DeltaConvDownload
from .evaluate import DeltaConvEvaluate
from .host.folders import register_folders
from .load_save import DeltaConvLoad, DeltaConvSave
from .locality import DeltaConvLocality, DeltaConvSaveLocality
from .recipe import DeltaConvRecipe
from .selftest import DeltaConvSelfTest


class DeltaConvExtension(ComfyExtension):
    """ComfyUI's entry into the pack."""

    async def on_load(self) -> None:
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            DeltaConvLoad,
            DeltaConvDownload,
            DeltaConvApply,
            DeltaConvCudaGraph,
            DeltaConvSave,
            DeltaConvCompare,
            DeltaConvDemoModel,
            DeltaConvDemoPrompt,
            DeltaConvLocality,
            DeltaConvSaveLocality,
            DeltaConvRecipe,
            DeltaConvChoose,
            DeltaConvDistill,
            DeltaConvDistillSettings,
            DeltaConvEvaluate,
            DeltaConvSelfTest,
            DeltaConvBenchmark,
        ]
