"""Where attention stays because it is faster: chosen, reported, compiled."""

import logging
import math
import re

import patched_models as models
import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock

apply, lora, sample, sample_pixart = (
    models.apply,
    models.lora,
    models.sample,
    models.sample_pixart,
)
pixart_weights = models.pixart_weights

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")


def choose_by(monkeypatch, takes_block):
    """Times that come out as told, so that both ways are tested on any machine."""
    from comfyui_deltaconv.deltaconv.application import fastest
    from comfyui_deltaconv.nodes.host import application

    def told(device, call):
        call()
        return 0.01 if (call.__name__ == "convolve") == takes_block else 0.02

    monkeypatch.setattr(fastest, "seconds", told)
    monkeypatch.setattr(fastest, "BUDGET", math.inf)
    monkeypatch.setattr(application, "_CHOICES", fastest.Choices())


@pytest.mark.parametrize("takes_block", [True, False])
def test_where_faster_runs_what_was_measured_to_be(base, weights, monkeypatch, caplog, takes_block):
    choose_by(monkeypatch, takes_block)
    patched, report = apply(base, weights, when="where faster")
    assert "the log says what was chosen" in report
    with caplog.at_level(logging.INFO):
        got = sample(patched)
        sample(patched)
    assert torch.equal(got, sample(apply(base, weights)[0] if takes_block else base))
    said = [r.getMessage() for r in caplog.records if "attention stays where" in r.getMessage()]
    assert len(said) == 1
    assert f"blocks run in {10 if takes_block else 0} of 10 layers" in said[0]


def test_where_faster_reports_at_once_for_a_latent(base, weights, monkeypatch):
    choose_by(monkeypatch, False)
    latent = {"samples": torch.zeros(1, 3, 24, 16)}
    _, report = apply(base, weights, when="where faster", latent=latent)
    assert "blocks run in 0 of 10 layers and shapes at batch 2" in report
    assert "middle_block.1.transformer_blocks.0.attn1 at 6 × 4 (10 ms against 20 ms)" in report


def test_where_faster_on_pixart(pixart, pixart_weights, monkeypatch):
    choose_by(monkeypatch, False)
    latent = {"samples": torch.zeros(1, 4, 36, 48)}
    patched, report = apply(pixart, pixart_weights, when="where faster", latent=latent)
    assert "blocks run in 0 of 3 layers" in report
    assert torch.equal(sample_pixart(patched), sample_pixart(pixart))


# Torch's compiler, the slow part, is the same below both.
@pytest.mark.any_comfyui
def test_a_compiled_model_keeps_attention_where_it_was_faster(pixart, pixart_weights, monkeypatch):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    choose_by(monkeypatch, False)
    latent = {"samples": torch.zeros(1, 4, 36, 48)}
    patched, _ = apply(pixart, pixart_weights, when="where faster", latent=latent)
    torch._dynamo.reset()
    set_torch_compile_wrapper(patched, backend="eager")
    alone = sample_pixart(pixart, steps=1)
    torch.testing.assert_close(sample_pixart(patched, steps=1), alone)


@pytest.mark.long
@pytest.mark.any_comfyui
def test_inductor_finds_no_further_break_and_keeps_the_picture(base, weights, capsys):
    """ComfyUI's own wrapper for torch.compile with its default backend, stock and with blocks."""
    import time

    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    breaks, seconds = {}, {}
    for name, model in (("stock", base.clone()), ("blocks", apply(base, weights)[0])):
        expected = sample(model, steps=2)
        torch._dynamo.reset()
        counters.clear()
        set_torch_compile_wrapper(model, backend="inductor")
        got = sample(model, steps=2)
        breaks[name] = sum(counters["graph_break"].values())
        # Inductor adds up in another order; a block that did not run would be far off.
        torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-3)
        start = time.perf_counter()
        sample(model, steps=2)
        seconds[name] = time.perf_counter() - start
    assert breaks["blocks"] <= breaks["stock"]
    with capsys.disabled():
        print(f"\ngraph breaks {breaks}, two steps {seconds}")


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_compiler_sees_one_way_and_no_break(comfy, monkeypatch, caplog, dynamic):
    from comfyui_deltaconv.nodes.host.application import Application
    from comfyui_deltaconv.nodes.host.sites import Site

    choose_by(monkeypatch, False)
    application = Application(None, (), where_faster=True)
    site, block = Site("middle.attn1", 16, 0, 100), DeltaConvBlock(16, 3)

    def layer(x, size):
        return application.compute(site, block, x, size, lambda: 2 * x)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=dynamic)
    timed = torch.randn(2, 20, 16)
    layer(timed, (5, 4))
    for height in (6, 7):
        never = torch.randn(2, 4 * height, 16)
        expected = block(never.unflatten(1, (height, 4))).flatten(1, 2)
        torch.testing.assert_close(compiled(never, (height, 4)), expected)
        assert torch.equal(compiled(timed, (5, 4)), 2 * timed)
    assert list(application.chosen) == [("middle.attn1", (2, 5, 4))]
    assert caplog.text.count("expected layers to be timed before the model is compiled") == 1


def test_what_was_not_timed_is_said(base, weights, monkeypatch, caplog):
    from comfyui_deltaconv.deltaconv.application import fastest

    choose_by(monkeypatch, True)
    monkeypatch.setattr(fastest, "BUDGET", 1e-9)
    with caplog.at_level(logging.INFO):
        sample(apply(base, weights, when="where faster")[0], size=(8, 8), steps=1)
    assert re.search(r"[1-9] of these layers and shapes were not timed, but judged", caplog.text)
