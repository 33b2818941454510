"""A workflow as people save and open it → the prompt that ComfyUI's API runs.

The web page does this in JavaScript (`app.graphToPrompt`); here /object_info stands in for its
widgets. Plain nodes, links, reroutes, notes, muted and bypassed nodes; no subgraphs.
"""

from collections.abc import Iterator
from typing import Any

from .. import DevelopmentError

Json = dict[str, Any]

MUTED, BYPASSED = 2, 4
# Nodes of the page alone: the server knows none of them.
NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = {"seed", "noise_seed"}


def to_prompt(workflow: Json, object_info: Json) -> Json:
    """{node id: {"class_type", "inputs", "_meta"}} of every node that runs.

    Raises DevelopmentError for a node the server does not have.
    """
    graph = _Graph(workflow, object_info)
    prompt = {}
    for node in workflow["nodes"]:
        if not graph.runs(node):
            continue
        inputs = dict(graph.widget_values(node))
        for slot in node.get("inputs", []):
            if slot.get("link") is None:
                continue
            if source := graph.source(slot["link"]):
                inputs[slot["name"]] = source
        prompt[str(node["id"])] = {
            "inputs": inputs,
            "class_type": node["type"],
            "_meta": {"title": node.get("title") or graph.title(node)},
        }
    return prompt


def without_others(prompt: Json, *wanted: str) -> Json:
    """The part of a prompt that the nodes with these ids need, themselves included."""
    kept, open_ids = {}, list(wanted)
    while open_ids:
        node = open_ids.pop()
        if node not in kept:
            kept[node] = prompt[node]
            open_ids += [source for source, _ in links(prompt[node]).values()]
    return {node: prompt[node] for node in prompt if node in kept}


def links(node: Json) -> dict[str, tuple[str, int]]:
    """Input name → (source node id, output index) of a node of a prompt."""
    inputs = node["inputs"].items()
    return {name: (value[0], value[1]) for name, value in inputs if isinstance(value, list)}


class _Graph:
    """A workflow's nodes and links by id, read with the server's node definitions."""

    def __init__(self, workflow: Json, object_info: Json):
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        # [link id, source id, source slot, target id, target slot, type]
        self.links = {link[0]: link for link in workflow["links"]}
        self.object_info = object_info

    def runs(self, node: Json) -> bool:
        """Whether the node reaches the server. Raises DevelopmentError if it is unknown there."""
        if node.get("mode", 0) in (MUTED, BYPASSED) or node["type"] in NOTES | {"Reroute"}:
            return False
        if node["type"] not in self.object_info:
            raise DevelopmentError(
                f"Expected nodes that this ComfyUI has, got {node['type']!r} (node {node['id']}). "
                "Install the pack it comes from; subgraphs and primitives are not read here."
            )
        return True

    def title(self, node: Json) -> str:
        return self.object_info[node["type"]].get("display_name") or node["type"]

    def widget_values(self, node: Json) -> Iterator[tuple[str, Any]]:
        """(input name, value) of each widget, in the order in which the page saves them."""
        saved = iter(node.get("widgets_values") or [])
        for name, (kind, *options) in self._specs(node["type"]):
            options = options[0] if options else {}
            if not _is_widget(kind, options):
                continue
            default = options.get("default", kind[0] if isinstance(kind, list) and kind else None)
            yield name, next(saved, default)
            if options.get("control_after_generate") or (kind == "INT" and name in SEEDS):
                # "fixed", "randomize", …: what the page does with the seed after a run.
                next(saved, None)
            if any(options.get(f"{media}_upload") for media in ("image", "audio", "video")):
                next(saved, None)

    def source(self, link: int) -> list | None:
        """[node id, output index] that a link brings; None if it ends at a muted node."""
        _, _, _, target, slot, *_ = self.links[link]
        wanted = self.nodes[target]["inputs"][slot]["type"]
        while link in self.links:
            _, origin, output, *_ = self.links[link]
            node = self.nodes[origin]
            if node.get("mode", 0) == MUTED:
                return None
            if node["type"] != "Reroute" and node.get("mode", 0) != BYPASSED:
                return [str(origin), output]
            slots = node.get("inputs", [])
            through = 0 if node["type"] == "Reroute" else _stand_in(node, output, wanted)
            link = slots[through].get("link") if through is not None else None
        return None

    def _specs(self, kind: str) -> Iterator[tuple[str, list]]:
        definition = self.object_info[kind]
        for group in ("required", "optional"):
            specs = definition["input"].get(group, {})
            for name in definition.get("input_order", {}).get(group, specs):
                yield name, specs[name]


def _is_widget(kind: Any, options: Json) -> bool:
    if options.get("forceInput"):
        return False
    return isinstance(kind, list) or kind in WIDGET_TYPES


def _stand_in(node: Json, output: int, wanted: str) -> int | None:
    """Index of the input that a bypassed node passes on in place of an output, as the page picks.

    `wanted` is the type of the input that asks; linked or not plays no part.
    """
    types = [slot["type"] for slot in node.get("inputs", [])]
    if wanted in ("*", ""):
        return output if output < len(types) else 0 if types else None
    own = node["outputs"][output]["type"]
    fitting = [i for i, kind in enumerate(types) if _fit(kind, own) and _fit(kind, wanted)]
    if output in fitting:
        return output
    exact = [i for i, kind in enumerate(types) if kind == wanted]
    return next(iter(exact + fitting), None)


def _fit(one: str, other: str) -> bool:
    """Whether the page lets these slot types be connected; "A,B" is either of two."""
    return "*" in (one, other) or not set(one.split(",")).isdisjoint(other.split(","))
