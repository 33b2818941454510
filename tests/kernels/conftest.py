"""What every test of the kernels starts from."""

import pytest
from comfyui_deltaconv.kernels import backend


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    """Every test starts with no choice made and nothing said."""
    monkeypatch.delenv("DELTACONV_KERNELS", raising=False)
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend, "_refused", {})
    backend.uses_triton.cache_clear()
    backend.triton_problem.cache_clear()
    yield
    backend.uses_triton.cache_clear()
    backend.triton_problem.cache_clear()
