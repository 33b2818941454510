"""Files and message of the page's interactive view: a picture and attention atlases."""

import hashlib
import os

import folder_paths

from ...deltaconv.locality.grid import HIGH, LOW, POINTS, GridMaps
from ...deltaconv.pictures.metrics import to_pil

_FOLDER = "deltaconv"


def view_message(picture, grid: GridMaps, percent: float) -> dict[str, list]:
    """Write picture [H, W, 3] and atlases to ComfyUI's temp folder → message for the page."""
    maps = []
    for entry in grid.atlases():
        file = _save(entry.pop("image"), f"attention_{entry['height']}x{entry['width']}")
        maps.append({**entry, "file": file})
    view = {
        "points": POINTS,
        "percent": percent,
        "low": LOW,
        "high": HIGH,
        "picture": _save(to_pil(picture), "picture"),
        "maps": maps,
    }
    return {"deltaconv_locality": [view]}


def _save(image, name: str) -> dict[str, str]:
    """Named by content: a page that was open before a restart never takes another's file for it."""
    folder = os.path.join(folder_paths.get_temp_directory(), _FOLDER)
    os.makedirs(folder, exist_ok=True)
    file = f"{name}_{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png"
    image.save(os.path.join(folder, file))
    return {"filename": file, "subfolder": _FOLDER, "type": "temp"}
