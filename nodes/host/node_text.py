"""A line of text on the node that is being executed, which the page shows below its widgets."""

from comfy_execution.utils import get_executing_context


def show_on_node(text: str) -> None:
    """Replace the running node's line; nothing where no server runs it."""
    if (context := get_executing_context()) is None:
        return
    # Imported here: without a server there is no node to write on.
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, context.node_id)
