"""Text on a node, mostly the one that is being executed; the page shows it below the widgets."""

from comfy_execution.utils import get_executing_context

# The page takes the text for HTML or Markdown, by the renderer; older pages run scripts in it.
_AS_TEXT = str.maketrans({each: f"&#{ord(each)};" for each in "&<>[]*_`~\\"})


def running_node() -> str:
    """The id of the node that is being executed; "" without a server."""
    context = get_executing_context()
    return "" if context is None else context.node_id


def present_node(node: str, class_type: str) -> str:
    """The number that a node of this class has now, which was `node` when it was executed.

    ComfyUI keeps what a node gave for any other of the same inputs, also in a graph opened later,
    where another node may have that number. "" where it is not there and several may be it.
    """
    if not running_node():
        return node
    from server import PromptServer

    running = get_executing_context().prompt_id
    present = []
    for item in PromptServer.instance.prompt_queue.get_current_queue_volatile()[0]:
        if item[1] == running:
            present += [each for each, held in item[2].items() if held["class_type"] == class_type]
    if node in present:
        return node
    return present[0] if len(present) == 1 else ""


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
