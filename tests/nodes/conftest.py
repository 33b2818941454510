"""The packaged demo under the names that tests of nodes use."""

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
    """One thread, an output folder of the test's own, and no training left behind."""
    import comfy.model_management
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    yield
    assert not comfy.model_management.in_training
