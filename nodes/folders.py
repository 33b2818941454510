"""Where ΔConv files are looked for and written."""

import os
import re
from pathlib import Path

import folder_paths

FOLDER = "deltaconv"
# Below output/deltaconv/distillation, beside the folders of states.
SAMPLES = "samples"
# What a distillation keeps, by the last two parts of its name.
_KEPT = re.compile(rf"distillation[/\\](.+[/\\]state-\d+|{SAMPLES}[/\\]samples-.+)\.safetensors")


def register_folders() -> None:
    """Make `models/deltaconv` and `output/deltaconv` known, behind what extra_model_paths named."""
    models = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, models)
    folder_paths.add_model_folder_path(FOLDER, output_folder())
    # An empty set of extensions would list every file there is.
    folder_paths.folder_names_and_paths[FOLDER][1].clear()
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


def output_folder() -> str:
    """The folder that saved weights go to."""
    return os.path.join(folder_paths.get_output_directory(), FOLDER)


def list_files() -> list[str]:
    """Names of all ΔConv files in the registered folders, without what distillations keep there."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if not _KEPT.fullmatch(name)]


def find_file(name: str) -> Path:
    """The path of a listed file; raises FileNotFoundError that says where files belong."""
    if path := folder_paths.get_full_path(FOLDER, name):
        return Path(path)
    folders = " or ".join(folder_paths.get_folder_paths(FOLDER))
    raise FileNotFoundError(
        f"Expected a ΔConv file in {folders}, got {name!r}, which is not there. Put the "
        ".safetensors file there and refresh the page."
    )
