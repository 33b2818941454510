"""Steps of whole models in the real ComfyUI, small and with random weights."""

import pytest
import torch
from host_models import SMALL

# What ComfyUI's version can change is tested with the nodes.
pytestmark = pytest.mark.any_comfyui


@pytest.fixture
def step_entry(as_comfyui_runs_nodes, monkeypatch):
    """What is measured of steps of a small model of that family at that many pixels."""
    from comfyui_deltaconv.benchmarks import model_steps, models

    small = {
        family: (name, config | SMALL[family], sizes)
        for family, (name, config, sizes) in models.MODELS.items()
    }
    monkeypatch.setattr(models, "MODELS", small)
    # However busy the machine is.
    monkeypatch.setattr(model_steps, "LONG_STEP", 1e9)
    monkeypatch.setattr(model_steps, "LONGEST_STEP", 1e9)

    def measure(family, pixels, repeats=2, batch=2):
        torch.manual_seed(0)
        patcher = models.build(family, torch.float32, torch.device("cpu"))
        return model_steps.measure(family, pixels, patcher, torch.float32, batch, repeats)

    return measure


def test_steps_of_whole_models_take_turns_behind_a_warm_up(step_entry, monkeypatch):
    from comfyui_deltaconv.benchmarks import model_steps
    from comfyui_deltaconv.deltaconv.block import DeltaConvBlock

    order, blocks = [], []
    real_once, real_forward = model_steps.once, DeltaConvBlock.forward
    monkeypatch.setattr(model_steps, "sampling", lambda *_: {"steps": 0, "variants": {}})

    def counted(self, x):
        blocks.append(1)
        return real_forward(self, x)

    def noted(step, device):
        blocks.clear()
        seconds = real_once(step, device)
        order.append(len(blocks))
        return seconds

    monkeypatch.setattr(DeltaConvBlock, "forward", counted)
    monkeypatch.setattr(model_steps, "once", noted)
    entry = step_entry("sd1", 64, repeats=3)
    assert list(entry["steps"]) == ["stock", "tome 0.3", "deltaconv", "deltaconv where faster"]
    # A round that is not counted, then three; the blocks run in none but ours.
    assert order[:3] == [0, 0, 16] and order[3] <= 16 and order == order[:4] * 4
    assert {timing["samples"] for timing in entry["steps"].values()} == {3}
    assert (entry["batch"], entry["dtype"]) == (2, "float32")
    assert entry["left_out"].keys() == {"hypertile 256, depth 0"}  # the map is one tile


def test_what_does_nothing_to_a_model_is_not_timed_as_an_alternative(step_entry):
    # SDXL has no attention at full resolution, where ToMe acts, and here its maps are one tile.
    entry = step_entry("sdxl", 64, repeats=1, batch=1)
    assert list(entry["steps"]) == ["stock", "deltaconv", "deltaconv where faster"]
    sentence = "no effect: its output is that of stock"
    assert entry["left_out"] == {"tome 0.3": sentence, "hypertile 256, depth 2": sentence}


@pytest.mark.parametrize(("family", "side"), [("sd1", 64), ("sdxl", 32), ("sdxl", 64)])
def test_hypertile_acts_where_the_family_has_attention(demo_model, family, side):
    from comfyui_deltaconv.benchmarks import model_steps

    (tiled,) = (m for name, m in model_steps.instead(family, demo_model).items() if "hyper" in name)
    (patch,) = tiled.model_options["transformer_options"]["patches"]["attn1_patch"]
    latent = side if family == "sd1" else 128
    q, _, _ = patch(
        torch.randn(1, side**2, 8), None, None, {"original_shape": [1, 4, latent, latent]}
    )
    # Tiles are 32 latent cells wide at least.
    assert q.shape == ((side // 32) ** 2, 32 * 32, 8)


def test_easycache_is_measured_over_sampled_steps_of_which_it_skips_some(step_entry, capsys):
    entry = step_entry("sd1", 64, repeats=1)
    found = entry["sampling"]["variants"]
    assert found.keys() == {"stock", "deltaconv", "easycache"}
    assert found["stock"]["computed"] == found["deltaconv"]["computed"] == 20
    assert 0 < found["easycache"]["computed"] < 20
    assert all(timing["median"] > 0 for timing in found.values())
    assert "20 steps sampled, easycache" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "pixels"), [("pixart", 512), ("anima", 128)])
def test_a_transformer_has_stock_and_blocks_alone(step_entry, family, pixels, monkeypatch):
    from comfyui_deltaconv.deltaconv.block import DeltaConvBlock

    maps, real = [], DeltaConvBlock.forward

    def noted(self, x):
        maps.append(x.shape[1:3])
        return real(self, x)

    monkeypatch.setattr(DeltaConvBlock, "forward", noted)
    entry = step_entry(family, pixels, repeats=1)
    # Blocks that never run would be timed as attention.
    assert set(maps) == {(pixels // 16, pixels // 16)}
    assert (
        list(entry["steps"]) == ["stock", "deltaconv", "deltaconv where faster"]
        and "sampling" not in entry
    )


def test_a_variant_without_memory_leaves_the_others_to_be_timed(step_entry, monkeypatch):
    from comfyui_deltaconv.benchmarks import model_steps

    real = model_steps.instead

    def with_one_too_large(family, patcher):
        def too_much(q, k, v, options):
            raise torch.OutOfMemoryError("CUDA out of memory")

        found = real(family, patcher)
        found["large"] = patcher.clone()
        found["large"].set_model_attn1_patch(too_much)
        return found

    monkeypatch.setattr(model_steps, "instead", with_one_too_large)
    entry = step_entry("sd1", 64, repeats=1)
    assert entry["left_out"]["large"] == "out of memory"
    assert "stock" in entry["steps"] and "large" not in entry["steps"]


@pytest.mark.parametrize(("family", "pixels"), [("sd1", 64), ("pixart", 512)])
def test_replayed_variants_are_replayed(step_entry, family, pixels, monkeypatch):
    from comfyui_deltaconv.benchmarks import model_steps
    from comfyui_deltaconv.nodes.host.replay import Replays

    replayed = []

    def record(call):
        output = call()
        return lambda: replayed.append(1), output

    monkeypatch.setattr(model_steps, "replays_for", lambda device: Replays(record, "cpu"))
    monkeypatch.setattr(model_steps, "sampling", lambda *_: {"steps": 0, "variants": {}})
    entry = step_entry(family, pixels, repeats=2)
    names = [name for name in entry["steps"] if name.endswith(", replayed")]
    assert len(names) == 3
    # Recorded and replayed at warm-up, met a third time, and in every round.
    assert len(replayed) == 3 * (2 + 3)
    assert entry["same_bits"] == dict.fromkeys(
        ("stock", "deltaconv", "deltaconv where faster"), True
    )


def test_what_is_not_replayed_gets_no_time(step_entry, monkeypatch):
    from comfyui_deltaconv.benchmarks import model_steps
    from comfyui_deltaconv.nodes.host.replay import Replays

    def refuse(call):
        raise RuntimeError("no")

    monkeypatch.setattr(model_steps, "replays_for", lambda device: Replays(refuse, "cpu"))
    entry = step_entry("pixart", 512, repeats=1)
    assert not any(name.endswith(", replayed") for name in entry["steps"])
    assert "not replayed: " in entry["left_out"]["stock, replayed"]
