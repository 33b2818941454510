"""Folders of ΔConv files: where they are read from and written to."""

import logging
import os
import re
from contextlib import suppress
from pathlib import Path

import folder_paths

FOLDER = "deltaconv"
# The Hugging Face repository of the method's authors.
PUBLISHED = "7eu7d7/ConvFusion"
# Shown if there is no file: the page shows an empty list as "undefined" and sends nothing.
NO_FILE = "none: put one into models/deltaconv"
# Below output/deltaconv/distillation, beside the folders of states.
SAMPLES = "samples"
# Files of a distillation, by the last two parts of their names.
_KEPT = re.compile(rf"distillation[/\\](.+[/\\]state-\d+|{SAMPLES}[/\\]samples-.+)\.safetensors")


def register_folders() -> None:
    """Register `models/deltaconv` and `output/deltaconv` after the folders of extra_model_paths.

    Creates the first, so that users find it, unless the installation is read-only.
    """
    models = str(models_folder())
    folder_paths.add_model_folder_path(FOLDER, models)
    folder_paths.add_model_folder_path(FOLDER, output_folder())
    # An empty set of extensions would list every file.
    folder_paths.folder_names_and_paths[FOLDER][1].clear()
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")
    try:
        os.makedirs(models, exist_ok=True)
    except OSError as error:
        logging.warning("ΔConv: cannot create %s (%s); going on without it.", models, error)


def models_folder() -> Path:
    """The folder that downloads go to, and that `repositories.json` lies in."""
    return Path(folder_paths.models_dir) / FOLDER


def input_folders() -> list[Path]:
    """The registered folders without the one that saved weights go to."""
    folders = folder_paths.get_folder_paths(FOLDER)
    return [Path(folder) for folder in folders if folder != output_folder()]


def output_folder() -> str:
    """The folder that saved weights go to."""
    return os.path.join(folder_paths.get_output_directory(), FOLDER)


def list_files() -> list[str]:
    """Names of all ΔConv files in the registered folders, without states and samples."""
    try:
        names = folder_paths.get_filename_list(FOLDER)
    except FileNotFoundError:
        # A folder was removed meanwhile, and ComfyUI's list still asks when it was changed.
        folder_paths.filename_list_cache.pop(FOLDER, None)
        names = folder_paths.get_filename_list(FOLDER)
    return [name for name in names if not _KEPT.fullmatch(name)]


def offered_files() -> list[str]:
    """Options of a node: the files, or a sentence on where to put one if there is none."""
    return list_files() or [NO_FILE]


def file_state(path: Path | None) -> str:
    """What is another text when the file was written again or replaced; "" where there is none.

    Its number is part of it: a copy may have the size and the time of the file it replaces.
    """
    if path is None:
        return ""
    status = path.stat()
    return f"{status.st_ino}:{status.st_mtime_ns}:{status.st_size}"


def find_file(name: str) -> Path:
    """The path of a listed file; raises FileNotFoundError that says where files belong."""
    # A workflow may hold anything in place of a name, also what no system takes for one.
    if isinstance(name, str) and name != NO_FILE:
        with suppress(ValueError):
            if path := folder_paths.get_full_path(FOLDER, name):
                return Path(path)
    folders = " or ".join(folder_paths.get_folder_paths(FOLDER))
    got = "no choice of one" if name in ("", NO_FILE) else f"{name!r:.200}, which is not there"
    raise FileNotFoundError(
        f"Expected a ΔConv file in {folders}, got {got}. Put the .safetensors file there, press R "
        "to refresh the page's lists, and choose it. Published ones are on Hugging Face, in "
        f"{PUBLISHED}; the README of this pack says which is for which model."
    )
