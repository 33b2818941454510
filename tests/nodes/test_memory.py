"""Load, apply, sample and unload, again and again: nothing stays alive, and memory stays flat."""

import gc
import statistics
import weakref

import psutil
import pytest
from patched_models import apply, sample

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes", "one_thread")

MB = 1 << 20


def cycle(weights) -> list:
    """Weak references to all that one cycle made."""
    import comfy.model_management
    from comfyui_deltaconv.nodes.host.demo_model import load_demo_model

    base = load_demo_model()
    patched, _ = apply(base, weights)
    sample(patched, (8, 8), steps=1)
    sample(base, (8, 8), steps=1)
    comfy.model_management.unload_all_models()
    (blocks,) = patched.get_additional_models_with_key("deltaconv")
    application = patched.callbacks["on_pre_run"]["deltaconv"][0].__self__
    made = (base, base.model, patched, blocks, blocks.model, application)
    return [weakref.ref(each) for each in made]


def used() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / MB


def test_nothing_of_a_cycle_stays_alive(demo_weights):
    for _ in range(2):
        alive = cycle(demo_weights)
        gc.collect()
        assert not [each() for each in alive if each() is not None]


@pytest.mark.long
def test_memory_is_flat_after_fifty_cycles(demo_weights, capsys):
    # What ComfyUI and torch make once is there then.
    for _ in range(10):
        cycle(demo_weights)
    readings = []
    for _ in range(50):
        cycle(demo_weights)
        readings.append(used())
    first, last = statistics.median(readings[:10]), statistics.median(readings[-10:])
    with capsys.disabled():
        print(f"\n{first:.1f} MB, {last:.1f} MB, {min(readings):.1f} to {max(readings):.1f} MB")
    # Three times the spread of fifty readings, 4.5 MB; one model that stays has 27 MB, and a set of
    # blocks in every cycle 54.
    assert last - first < 13.5
