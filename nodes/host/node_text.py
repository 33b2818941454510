"""Text on a node, mostly the one that is being executed; the page shows it below the widgets."""

from comfy_execution.utils import get_executing_context

# The page takes the text for HTML or Markdown, by the renderer; older pages run scripts in it.
_AS_TEXT = str.maketrans({each: f"&#{ord(each)};" for each in "&<>[]*_`~\\"})


def running_node() -> str:
    """The id of the node that is being executed; "" without a server."""
    context = get_executing_context()
    return "" if context is None else context.node_id


def show_on_node(text: str, node: str | None = None) -> None:
    """Replace a node's text, that of the running one by default; does nothing without a server.

    Names and prompts in it come from strangers: nothing in it acts as markup.
    """
    if not running_node():
        return
    # Import here: without a server the module is missing.
    from server import PromptServer

    # The newer renderer runs lines into one.
    line = text.replace("\n", "; ").translate(_AS_TEXT)
    PromptServer.instance.send_progress_text(line, node or running_node())


def show_error(error: BaseException, where: str = "") -> None:
    """Show an error's sentence after `where` on the running node, unless that was done before."""
    if not getattr(error, "on_node", False):
        show_on_node(f"{where}. {error}" if where else str(error))
        # What catches it further out has nothing to add.
        error.on_node = True
