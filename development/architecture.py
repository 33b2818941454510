"""`python dev.py architecture`: draw docs/architecture.md's map from the imports, as they are now.

--check writes nothing and fails where the map is not that of the code. A circle is an error.
"""

import argparse
from graphlib import CycleError, TopologicalSorter

from . import ROOT, DevelopmentError

PACKAGE = "comfyui_deltaconv"
MAP = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- map: dev.py architecture -->\n", "<!-- end of the map -->\n"
# Room → what a reader of the map wants to know first.
PURPOSE = {
    "development": "what dev.py runs",
    "cli": "commands for a terminal",
    "benchmarks": "layers and models against others",
    "nodes": "what ComfyUI shows",
    "nodes/host": "patches, sampling, folders",
    "nodes/host/sites": "one class per kind of model",
    "deltaconv": "block, geometry, families",
    "deltaconv/application": "what applying came to",
    "deltaconv/distillation": "teacher to blocks",
    "deltaconv/hub": "files on Hugging Face",
    "deltaconv/locality": "where attention looks",
    "deltaconv/pictures": "metrics, sheets, figures",
    "deltaconv/scale": "many processes, stored data",
    "deltaconv/weights": "files and what they fit",
    "kernels": "definitions and their fast forms",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py architecture", description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(argv).check
    text = MAP.read_text(encoding="utf-8")
    drawn = with_map(text, mermaid(arrows()))
    if check and drawn != text:
        print("docs/architecture.md has an older map. Run `python dev.py architecture`.")
        return 1
    if not check:
        MAP.write_text(drawn, encoding="utf-8")
        print(f"Drew {MAP}.")
    return 0


def arrows() -> dict[str, set[str]]:
    """Room → the rooms that it imports from. What an `__init__` passes on counts for nobody."""
    import grimp

    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    facades = {f"{PACKAGE}.{room.replace('/', '.')}" for room in PURPOSE}
    found: dict[str, set[str]] = {room: set() for room in PURPOSE}
    # The pack's own module and dev.py, which stands beside it, start everything and are no room.
    for module in graph.modules - facades - {PACKAGE, f"{PACKAGE}.dev"}:
        room = room_of(module, module in facades)
        imported = (
            room_of(other, other in facades)
            for other in graph.find_modules_directly_imported_by(module)
        )
        found[room] |= {other for other in imported if other != room}
    return found


def room_of(module: str, is_package: bool) -> str:
    """The folder that a module lies in, as far down as the map goes."""
    parts = module.removeprefix(f"{PACKAGE}.").split(".")
    folders = parts if is_package else parts[:-1]
    while "/".join(folders) not in PURPOSE:
        if not folders:
            raise DevelopmentError(f"Expected {module} in a room of the map, got none. Add it.")
        folders = folders[:-1]
    return "/".join(folders)


def mermaid(rooms: dict[str, set[str]]) -> str:
    """The map as a Mermaid flowchart; an arrow that a longer way says as well is left out.

    Raises DevelopmentError, naming the rooms, where there is a circle.
    """
    try:
        # Sorted: the order of a set, and with it the drawing, changes from run to run.
        graph = {room: sorted(below) for room, below in rooms.items()}
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise DevelopmentError(f"Expected no circle, got {' → '.join(error.args[1])}.") from error
    below: dict[str, set[str]] = {}
    for room in order:
        below[room] = set().union(*({other} | below[other] for other in rooms[room]))
    lines = ["flowchart TD"]
    for room in reversed(order):
        lines.append(f'    {_name(room)}["<b>{room}/</b><br>{PURPOSE[room]}"]')
    for room in reversed(order):
        for other in sorted(rooms[room], key=order.index, reverse=True):
            if not any(other in below[third] for third in rooms[room]):
                lines.append(f"    {_name(room)} --> {_name(other)}")
    return "\n".join(lines)


def _name(room: str) -> str:
    return room.replace("/", "_")


def with_map(text: str, drawing: str) -> str:
    """The document with its map exchanged."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n```mermaid\n{drawing}\n```\n\n{END}{after}"
