"""The packaged demo under the names that tests of nodes use."""

from functools import partial

import pytest


@pytest.fixture
def base(demo_model):
    return demo_model


@pytest.fixture
def model(demo_model):
    return demo_model


@pytest.fixture
def weights(demo_weights):
    return demo_weights


@pytest.fixture
def distilling(one_thread, as_comfyui_runs_nodes, comfy, tmp_path, monkeypatch):
    """One thread, an output folder of the test's own, and no training left behind.

    Presets begin from 16 images, where a user's run takes 128.
    """
    import comfy.model_management
    import folder_paths
    from comfyui_deltaconv.deltaconv.distillation import PRESETS

    for name in ("default", "tokens"):
        monkeypatch.setitem(PRESETS, name, partial(PRESETS[name], init_images=16))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    yield
    assert not comfy.model_management.in_training


@pytest.fixture
def folders(comfy, tmp_path, monkeypatch):
    """ComfyUI's folders in an empty place, with one folder named by extra_model_paths."""
    import folder_paths
    from comfyui_deltaconv.nodes.host.folders import register_folders

    extra = tmp_path / "extra"
    extra.mkdir()
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    named = {**folder_paths.folder_names_and_paths, "deltaconv": ([str(extra)], set())}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", named)
    folder_paths.filename_list_cache.clear()
    register_folders()
    register_folders()
    return tmp_path
