"""`python dev.py limits`: what blocks are told is what its name says."""

import pytest
import torch
from comfyui_deltaconv.development.limits import CELLS, oracles


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 8, 12, 5, generator=generator, dtype=torch.float64)


def error(given, a):
    return (given - a).square().sum((1, 2))


def test_what_is_told_is_what_the_name_says(maps):
    y, a = maps
    told = {name: oracle(y, a) for name, oracle in oracles().items()}
    assert told["nothing"] is y
    means = told["the mean of each channel"]
    assert torch.allclose(means.mean((1, 2)), a.mean((1, 2)))
    assert torch.allclose(means - means.mean((1, 2), True), y - y.mean((1, 2), True))
    assert torch.allclose(told["a scale of each channel"].mean((1, 2)), y.mean((1, 2)))
    assert torch.allclose(told["half of the error"], (y + a) / 2)
    assert torch.allclose(told["30% of the error"], 0.7 * y + 0.3 * a)
    cells = told[f"{CELLS} × {CELLS} means of each channel"] - a
    assert cells.reshape(2, CELLS, 2, CELLS, 3, 5).mean((2, 4)).abs().max() < 1e-12


@pytest.mark.parametrize("change", [0.01, -0.01])
def test_no_other_scale_and_mean_come_closer(maps, change):
    y, a = maps
    best = oracles()["both"](y, a)
    centered = best - best.mean((1, 2), True)
    for other in (best + change, best + change * centered):
        assert (error(best, a) < error(other, a)).all()
    # The same picture, scaled and shifted by channel, is told whole.
    assert torch.allclose(oracles()["both"](3 * a - 2, a), a)
