"""The cost model against what is there: parameters of real weights, bytes of a real store."""

import pytest
import torch
from comfyui_deltaconv.deltaconv.families import FAMILIES
from comfyui_deltaconv.deltaconv.scale.cost import Load, hours, step_seconds, trained_parameters
from comfyui_deltaconv.deltaconv.scale.store import Store, StoredItem


def test_parameters_are_those_of_a_real_file(demo_weights):
    dims = {site: geometry.dim for site, geometry in demo_weights.sites.items()}
    kernels = {site: geometry.kernel_size for site, geometry in demo_weights.sites.items()}
    tensors = [t for site in dims for t in demo_weights.state(site).values()]
    assert trained_parameters(dims, kernels) == sum(tensor.numel() for tensor in tensors)


def test_published_sdxl_is_what_the_page_says():
    family = FAMILIES["sdxl"]
    kernels = {site: family.published_kernel(site) for site in family.dims}
    load = Load(
        2_567_000_000, trained_parameters(family.dims, kernels), (4, 128, 128), [(77, 2048)]
    )
    assert round(load.trained / 1e6, 1) == 211.3
    assert round(load.network_bytes(8) / 1e6) == 1479 and load.network_bytes(1) == 0
    assert round(load.memory_bytes() / 2**30, 1) == 8.7
    # 8 images on 2 devices of 2 images a second; 1 GB sent at 2 GB/s.
    assert step_seconds(2.0, 8, 2, 1e9, 2e9) == 2.5
    assert hours(7200, 2.5) == 5


def test_items_take_the_stated_bytes(tmp_path):
    store = Store(tmp_path)
    pooled = {"pooled_output": torch.randn(1, 1280)}
    entry = (torch.randn(1, 77, 2048), pooled)
    store.begin({"base": "b", "parts": 1}, entry)
    latent = torch.randn(4, 128, 128)
    store.write(
        0, (StoredItem(f"pictures/{n}.png", "a caption", latent, entry) for n in range(50)), {}
    )
    found = (tmp_path / "part-000000.arrow").stat().st_size / 50
    expected = Load(0, 0, (4, 128, 128), [(77, 2048), (1280,)]).item_bytes()
    assert found == pytest.approx(expected, rel=0.01)
