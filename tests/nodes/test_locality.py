"""Locality measured in the real ComfyUI: the output stays stock, and figures meet brute force."""

import html.parser
import json
import re

import pytest
import torch
from comfyui_deltaconv.deltaconv import demo, read_weights
from comfyui_deltaconv.deltaconv.locality.document import read_report
from comfyui_deltaconv.deltaconv.locality.settings import LocalityPlan
from comfyui_deltaconv.deltaconv.locality.text import report_text
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

MEASURED = ("x", "timesteps", "context")


@pytest.fixture
def positive():
    return [[demo.text_encoder().encode("red apple"), {}]]


@pytest.fixture
def small():
    return {"samples": torch.zeros(1, 3, 24, 16)}


@pytest.fixture
def golden(data):
    return load_file(data / "demo_forward.safetensors")


def call(model, golden, options=None):
    """The UNet's own output through its patcher."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    options = {**model.model_options["transformer_options"], **(options or {})}
    x, timesteps, context = (golden[name] for name in MEASURED)
    unet = model.model.diffusion_model
    return unet(x, timesteps, context=context, transformer_options=options)


def watched(model, **settings):
    """(probe, clone) that measures every site."""
    from comfyui_deltaconv.nodes.host.probe import Probe, probed
    from comfyui_deltaconv.nodes.host.sites import find_sites

    model_sites = find_sites(model)
    probe = Probe(model_sites, LocalityPlan(**settings), watching=True)
    return probe, probed(model, model_sites, probe)


def brute_force(module, x, height, width):
    """Mass in 9 × 9, mean distance, entropy, by the whole N × N map in float64."""
    q, k = (
        f(x).unflatten(-1, (module.heads, -1)).transpose(1, 2) for f in (module.to_q, module.to_k)
    )
    p = (q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    index = torch.arange(height * width)
    y, x = index // width, index % width
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    inside = (p * (torch.maximum(dy, dx) <= 4)).sum(dim=-1).mean()
    distance = (p * (dy**2 + dx**2).double().sqrt()).sum(dim=-1).mean()
    return float(inside), float(distance), float(-torch.xlogy(p, p).sum(dim=-1).mean())


def test_measuring_is_stock_bit_for_bit_and_meets_brute_force(model, golden):
    from comfyui_deltaconv.deltaconv.locality.profile import mean_distance, window_mass

    # Half the size: the whole maps of 64 × 64 would take the gate's time and memory.
    golden["x"] = golden["x"][:, :, 16:48, 8:48].contiguous()
    stock = call(model, golden)
    probe, clone = watched(model, points=((0.5, 0.5),))
    inputs = {}
    hooks = [
        clone.model.diffusion_model.get_submodule(path).register_forward_pre_hook(
            lambda _, arguments, path=path: inputs.update({path: arguments[0]})
        )
        for path in probe.model_sites.sites
    ]
    assert torch.equal(call(clone, golden), stock)
    for hook in hooks:
        hook.remove()
    statistics, maps = probe.take()
    assert len(statistics) == len(maps) == 10 and not probe.left_out
    for path, (found,) in statistics.items():
        module = clone.model.diffusion_model.get_submodule(path)
        expected = brute_force(module, inputs[path], found.height, found.width)
        got = (
            float(window_mass(found.offsets).mean(dim=(0, 1))[4]),
            float(mean_distance(found.offsets).mean()),
            float(found.entropy.mean()),
        )
        assert got == pytest.approx(expected, abs=1e-4)
        assert maps[path].float().sum(dim=(-2, -1)).sub(1).abs().max() < 1e-2
    assert torch.equal(call(model, golden), stock)


def test_an_attention_override_is_chained_and_only_attn1_is_seen(model, golden):
    golden = {name: golden[name][:1] for name in MEASURED}
    golden["x"] = golden["x"][:, :, :16, :16]
    seen = []

    def override(function, q, k, *arguments, **settings):
        seen.append(k.shape[1])
        return function(q, k, *arguments, **settings) * 0.5

    options = {"optimized_attention_override": override}
    halved = call(model, golden, options)
    before, seen[:] = list(seen), []
    probe, clone = watched(model, points=())
    assert torch.equal(call(clone, golden, options), halved)
    assert seen == before and len(seen) == 20
    statistics, _ = probe.take()
    assert {path: len(calls) for path, calls in statistics.items()} == dict.fromkeys(
        probe.model_sites.sites, 1
    )


def test_tokens_that_are_no_map_are_left_out_with_a_reason(model, golden):
    golden = {name: golden[name][:1] for name in MEASURED}
    golden["x"] = golden["x"][:, :, :16, :16]

    clone = model.clone()
    clone.set_model_attn1_patch(lambda n, c, v, e: (n, c[:, ::2], v[:, ::2]))
    probe, patched = watched(clone, points=())
    call(patched, golden)
    assert not probe.take()[0]
    assert set(probe.left_out) == set(probe.model_sites.sites)
    assert "keys of its own" in probe.left_out["middle_block.1.transformer_blocks.0.attn1"]


@pytest.mark.parametrize("size", [(36, 48), (38, 34)])
def test_pixart_is_measured_without_changing_it(pixart, size):
    from comfyui_deltaconv.deltaconv.locality.profile import window_mass
    from comfyui_deltaconv.nodes.host.locality import measure_locality

    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(1, 4, *size, generator=generator)
    positive = [[torch.randn(1, 8, 32, generator=generator), {}]]
    report = measure_locality(pixart, positive, latent, LocalityPlan(percents=(0.5,)))
    assert list(report.sites) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    site = report.sites["blocks.1.attn"]
    assert (site.height, site.width, site.heads) == (size[0] // 2, size[1] // 2, 4)

    probe, clone = watched(pixart, points=())
    import comfy.model_management

    comfy.model_management.load_models_gpu([clone])
    transformer = clone.model.diffusion_model
    x, context = torch.randn(2, 4, *size), torch.randn(1, 8, 32)
    arguments = (x, torch.tensor([500.0, 500.0]), context.expand(2, -1, -1))
    probe.watching = False
    stock = transformer(*arguments)
    probe.watching = True
    assert torch.equal(transformer(*arguments), stock)
    statistics, _ = probe.take()
    assert float(window_mass(statistics["blocks.0.attn"][0].offsets)[..., -1].mean()) == (
        pytest.approx(1, abs=1e-5)
    )


@pytest.mark.any_comfyui
def test_a_window_that_holds_the_map_costs_nothing_and_blocks_cost_what_they_cost(
    model, positive, small
):
    from comfyui_deltaconv.nodes.locality import DeltaConvLocality

    weights = read_weights(demo.DELTACONV_PATH)
    report, table, *pictures = DeltaConvLocality.execute(
        model,
        positive,
        {"samples": torch.rand(1, 3, 24, 16)},
        percents="0.5, 0.6",
        points="0.5, 0.5; 0.1, 0.9",
        sensitivity="window and block",
        deltaconv=weights,
        window=47,
    ).args
    assert len(report.sites) == 10 and report.sigmas == sorted(report.sigmas, reverse=True)
    for site in report.sites.values():
        assert max(site.sensitivity.window_error) < 1e-6
        assert min(site.sensitivity.block_error) > 1e-5
        assert len(site.measurements) == 2
    assert table.count("\n") > 14 and "block error" in table
    assert [picture.shape[0] for picture in pictures] == [1, 1, 2]
    assert all(0.5 < float(picture.mean()) < 1 for picture in pictures)
    again = read_report(report.to_json())
    assert report_text(again) == table
    assert torch.equal(
        again.maps["middle_block.1.transformer_blocks.0.attn1"],
        report.maps["middle_block.1.transformer_blocks.0.attn1"],
    )


def test_the_block_error_is_that_of_the_applied_block(model, positive, small):
    """Against Apply on one site, sampled by ComfyUI for one step from the same noise."""
    import comfy.sample
    from comfyui_deltaconv.nodes.apply import DeltaConvApply
    from comfyui_deltaconv.nodes.host.locality import measure_locality

    weights = read_weights(demo.DELTACONV_PATH)
    plan = LocalityPlan(percents=(0.0,), sensitivity="block", seed=5, points=())
    report = measure_locality(model, positive, small["samples"], plan, weights)
    path = "output_blocks.4.1.transformer_blocks.0.attn1"
    patched = DeltaConvApply.execute(model, weights, sites=path).args[0]
    noise = comfy.sample.prepare_noise(small["samples"], 5)
    sigma = report.sigmas[0]
    kinds = []
    for each in (model, patched):
        steps = torch.tensor([sigma, 0.0])
        out = comfy.sample.sample(
            each, noise, 1, 1.0, "euler", "normal", positive, [], small["samples"], sigmas=steps
        )
        kinds.append(out)
    x = noise * (1 + sigma**2) ** 0.5
    expected = (kinds[1] - kinds[0]).square().mean() / (x - kinds[0]).square().mean()
    assert report.sites[path].sensitivity.error == pytest.approx(float(expected), rel=1e-3)


def test_given_latents_get_noise_and_samples_are_repeatable(model, positive, small):
    from comfyui_deltaconv.nodes.host.locality import measure_locality

    plan = LocalityPlan(percents=(0.6,), points=())
    given = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, second = (measure_locality(model, positive, given, plan) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert "given latents" in first.source
    own = measure_locality(model, positive, small["samples"], plan)
    assert "own samples" in own.source and own.latent == (24, 16)


def test_blocks_on_the_model_are_taken_off_for_measuring(model, positive, small):
    from comfyui_deltaconv.nodes.apply import DeltaConvApply
    from comfyui_deltaconv.nodes.host.locality import measure_locality

    plan = LocalityPlan(percents=(0.6,), points=())
    patched = DeltaConvApply.execute(model, read_weights(demo.DELTACONV_PATH)).args[0]
    plain = measure_locality(model, positive, small["samples"], plan)
    assert measure_locality(patched, positive, small["samples"], plan).to_json() == plain.to_json()


def test_interrupt_stops_within_one_site_and_leaves_the_model_as_it_was(
    model, positive, golden, monkeypatch
):
    import comfy.model_management
    from comfyui_deltaconv.nodes.host import probe
    from comfyui_deltaconv.nodes.host.locality import measure_locality

    golden = {name: golden[name][:1] for name in MEASURED}
    golden["x"] = golden["x"][:, :, :32, :32].contiguous()
    stock = call(model, golden)
    # Small chunks, so that one site of this small map has several.
    monkeypatch.setitem(probe._CHUNK_BYTES, "cpu", 2**18)
    chunks, measure = [], probe.measure_attention

    def interrupted_in_the_third_chunk(*arguments, between_chunks, **settings):
        def count():
            chunks.append(1)
            if len(chunks) == 3:
                comfy.model_management.interrupt_current_processing()
            between_chunks()

        return measure(*arguments, between_chunks=count, **settings)

    monkeypatch.setattr(probe, "measure_attention", interrupted_in_the_third_chunk)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        measure_locality(model, positive, golden["x"], LocalityPlan(percents=(0.5,)))
    assert len(chunks) == 3
    assert torch.equal(call(model, golden), stock)


@pytest.mark.any_comfyui
@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"percents": "half"}, "Expected percents as fractions"),
        ({"points": "0.5"}, "Expected query points as x, y"),
        ({"points": "2, 0"}, "Expected query points as x, y"),
        ({"sensitivity": "block"}, "Expected ΔConv weights"),
        ({"window": 4}, "an odd window"),
        ({"queries": 5}, "at least 32 queries"),
    ],
)
def test_bad_inputs_are_refused_before_the_model_runs(model, positive, small, inputs, reason):
    from comfyui_deltaconv.nodes.locality import DeltaConvLocality

    with pytest.raises(ValueError, match=reason):
        DeltaConvLocality.execute(model, positive, small, **inputs)


class Page(html.parser.HTMLParser):
    """What a page refers to and what its script element holds."""

    def __init__(self):
        super().__init__()
        self.sources, self.data, self.inside = [], "", False

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.data += data if self.inside else ""


@pytest.mark.any_comfyui
def test_saves_json_and_one_page_that_needs_nothing_else(
    model, positive, small, tmp_path, monkeypatch
):
    import folder_paths
    from comfyui_deltaconv.nodes.host.locality import measure_locality
    from comfyui_deltaconv.nodes.locality import DeltaConvSaveLocality

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    report = measure_locality(model, positive, small["samples"], LocalityPlan(percents=(0.5,)))
    report.left_out["x"] = "</script><b>"
    first = DeltaConvSaveLocality.execute(report, "locality").args
    second = DeltaConvSaveLocality.execute(report, "locality").args
    assert len({*first, *second}) == 4
    with pytest.raises(Exception, match="outside"):
        DeltaConvSaveLocality.execute(report, "../../escape")
    text = (tmp_path / "deltaconv" / first[0]).read_text(encoding="utf-8")
    assert json.loads(text)["format"] == 1
    page = Page()
    page.feed((tmp_path / "deltaconv" / first[1]).read_text(encoding="utf-8"))
    assert len(page.sources) == 3 and all(re.match("data:image/png", s) for s in page.sources)
    assert read_report(page.data).to_json() == report.to_json()


def test_without_matplotlib_the_table_works_and_pictures_say_how_to_get_it(
    model, positive, small, monkeypatch
):
    import builtins

    from comfyui_deltaconv.deltaconv.locality.html_page import report_html
    from comfyui_deltaconv.nodes.locality import DeltaConvLocality

    load = builtins.__import__

    def without(name, *arguments, **settings):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return load(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    report, table, *pictures = DeltaConvLocality.execute(model, positive, small, "0.5").args
    assert "middle" in table
    for picture in pictures:
        assert picture.shape[2] == 760 and float(picture.min()) < 0.5
    assert "pip install matplotlib" in report_html(report)
