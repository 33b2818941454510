"""ΔConvFusion for ComfyUI. Nothing is imported until ComfyUI asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's extension: its nodes, and the folders it registers."""
    from .nodes.extension import DeltaConvExtension

    return DeltaConvExtension()
