"""Files and message of the page's interactive view: a picture and attention atlases."""

import os

import folder_paths

from ...deltaconv.locality.grid import HIGH, LOW, POINTS, GridMaps
from ...deltaconv.pictures.metrics import to_pil


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
    base = folder_paths.get_temp_directory()
    os.makedirs(base, exist_ok=True)
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        f"deltaconv/{name}", base
    )
    file = f"{name}_{counter:05}_.png"
    image.save(os.path.join(folder, file))
    return {"filename": file, "subfolder": subfolder, "type": "temp"}
