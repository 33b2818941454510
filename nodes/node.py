"""What the pack's nodes have in common."""

from functools import wraps

from comfy_api.latest import io


class Node(io.ComfyNode):
    """A node whose refusals read well in the page.

    The page shows an error's class with its whole path, and its sentence only when asked: refusals
    are raised as errors of Python's own, and their sentence stands on the node.
    """

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        method = cls.__dict__.get("execute")
        if isinstance(method, classmethod) and not hasattr(method.__func__, "says_errors"):
            cls.execute = classmethod(_saying(method.__func__))


def _saying(execute):
    @wraps(execute)
    def saying(cls, *arguments, **inputs):
        try:
            return execute(cls, *arguments, **inputs)
        except (ValueError, OSError) as error:
            from .host.node_text import show_error

            show_error(error)
            if type(error).__module__ == "builtins":
                raise
            raise ValueError(str(error)) from error

    saying.says_errors = True
    return saying
