"""`python dev.py locales`: write the English texts of nodes and messages, which people translate.

The other languages' files are written by people; a test names what one of them lacks.
"""

import argparse
import asyncio
import json

from ..cli.host import entered
from ..deltaconv.messages import ENGLISH
from . import ROOT
from .comfyui.tree import chosen_tree

FILE = "nodeDefs.json"
# What nodes show on themselves; the page does not read it.
MESSAGES = "messages.json"
# As the page names them; the front end of ComfyUI 0.30.0 does not offer German yet.
LANGUAGES = ("en", "zh", "ja", "ko", "fr", "de", "es")


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="dev.py locales", description=__doc__).parse_args(argv)
    with entered(chosen_tree()):
        texts = node_texts()
    folder = ROOT / "locales" / "en"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((FILE, texts), (MESSAGES, ENGLISH)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)
    return 0


def node_texts() -> dict[str, dict]:
    """Node id → its texts, as ComfyUI's page looks for them; `cli.host.enter` comes first."""
    from ..nodes.extension import DeltaConvExtension

    async def nodes():
        extension = DeltaConvExtension()
        await extension.on_load()
        return await extension.get_node_list()

    schemas = [node.GET_SCHEMA() for node in asyncio.run(nodes())]
    return {schema.node_id: _texts(schema) for schema in schemas}


def _texts(schema) -> dict:
    inputs = {entry.id: {"name": entry.id, "tooltip": entry.tooltip} for entry in schema.inputs}
    outputs = {
        str(number): {"name": output.display_name or output.io_type}
        | ({"tooltip": output.tooltip} if output.tooltip else {})
        for number, output in enumerate(schema.outputs)
    }
    texts = {"display_name": schema.display_name, "description": schema.description}
    return texts | ({"inputs": inputs} if inputs else {}) | {"outputs": outputs}
