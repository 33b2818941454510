"""Benchmark ΔConv: what it measures, how it goes on where memory ends, how it leaves a MODEL."""

import gc
import sys
import weakref

import pytest
import torch
from comfyui_deltaconv.deltaconv import families
from host_models import REAL, SMALL, host_model, randomize


def run(model, weights, **inputs):
    """(table, plot) of the node itself, quickly."""
    from comfyui_deltaconv.nodes.benchmark import DeltaConvBenchmark

    quick = {"sizes": "8, 16x12", "repeats": 2, "seconds": 60.0}
    return DeltaConvBenchmark.execute(model, weights, **{**quick, **inputs}).args


def loaded():
    """The models that ComfyUI holds loaded."""
    import comfy.model_management

    entries = comfy.model_management.current_loaded_models
    return [entry.model for entry in entries if entry.model is not None]


def state_of(model):
    """Everything a node could leave behind on a MODEL and its model object."""
    # ComfyUI puts a module's own method back by name, which is no patch.
    foreign = {
        name
        for name, module in model.model.named_modules()
        if getattr(module.forward, "__func__", None) is not type(module).forward
    }
    return (
        dict(model.object_patches),
        set(model.additional_models),
        foreign,
        {key: len(value) for key, value in model.model_options.items()},
    )


def test_every_contender_runs_what_it_says(base, weights):
    calls = {"attention": 0, "blocks": 0}
    site = "middle_block.1.transformer_blocks.0.attn1"
    model, key = base.clone(), f"diffusion_model.{site}.forward"
    own = model.get_model_object(key)

    def attention(*arguments, **options):
        calls["attention"] += 1
        return own(*arguments, **options)

    model.add_object_patch(key, attention)
    from comfyui_deltaconv.deltaconv import block

    real = block.DeltaConvBlock.forward

    def counted(self, x):
        calls["blocks"] += 1
        return real(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block.DeltaConvBlock, "forward", counted)
        table, plot = run(model, weights, sizes="8", repeats=3)
    # Warm-up and three rounds, of the step and of the layers.
    assert calls == {"attention": 8, "blocks": 8 * len(weights.sites)}
    assert "CPU, float32, batch 2, torch" in table and "blocks by torch in 10 of 10" in table
    assert table.split("\n\n")[1].split("\n")[2].startswith("| 8 × 8 ")
    assert plot.shape[0] == 1 and plot.shape[-1] == 3 and plot.std() > 0.05


def test_the_heading_says_what_computes_pooled_tokens(base, monkeypatch):
    from comfyui_deltaconv.deltaconv import DeltaConvBlock
    from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
    from comfyui_deltaconv.nodes.host import benchmark

    site = "middle_block.1.transformer_blocks.0.attn1"
    channels = base.get_model_object(f"diffusion_model.{site}.to_q").in_features
    weights = weights_of_blocks({site: DeltaConvBlock(channels, 5, (1.0,), heads=2)})
    assert "blocks by torch in 1 of 10" in run(base, weights, sizes="8")[0]
    monkeypatch.setattr(benchmark, "implementation_of", lambda *_: "triton")
    found = run(base, weights, sizes="8")[0]
    assert "blocks by triton and pooled tokens by torch in 1 of 10" in found


@pytest.mark.any_comfyui
def test_no_sizes_means_the_usual_ones(base, weights, monkeypatch):
    monkeypatch.setattr(families, "_DEFAULT_LATENT", 8)
    table, _ = run(base, weights, sizes="")
    assert [line.split()[1] for line in table.split("\n")[4:6]] == ["8", "16"]


@pytest.mark.parametrize("before", ["unloaded", "loaded", "loaded and patched"])
def test_the_model_is_left_as_it_was(base, weights, before):
    import comfy.model_management
    from comfyui_deltaconv.nodes.apply import DeltaConvApply

    patched = DeltaConvApply.execute(base, weights).args[0]
    mine = {"unloaded": [], "loaded": [base]}.get(before)
    if mine is None:
        mine = [patched, *patched.get_nested_additional_models()]
    comfy.model_management.load_models_gpu(mine)
    state = state_of(base)
    tensors = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    run(patched if before == "loaded and patched" else base, weights)
    assert set(map(id, loaded())) == set(map(id, mine))
    assert state_of(base) == state
    assert all(torch.equal(tensors[name], t) for name, t in base.model.state_dict().items())


def test_the_blocks_are_gone_afterwards(base, weights, monkeypatch):
    from comfyui_deltaconv.nodes.host import benchmark

    seen, real = [], benchmark.load_blocks

    def noted(*arguments):
        patcher = real(*arguments)
        seen.append(weakref.ref(patcher.model))
        return patcher

    monkeypatch.setattr(benchmark, "load_blocks", noted)
    run(base, weights, sizes="8")
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


@pytest.mark.any_comfyui
def test_out_of_memory_at_one_size_is_reported_and_the_rest_goes_on(base, weights):
    site = "middle_block.1.transformer_blocks.0.attn1"
    model, key = base.clone(), f"diffusion_model.{site}.forward"
    own = model.get_model_object(key)

    def attention(x, *arguments, **options):
        if x.shape[1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return own(x, *arguments, **options)

    model.add_object_patch(key, attention)
    table, plot = run(model, weights, sizes="32, 8")
    large, small = table.split("\n")[4:6]
    assert large.startswith("| 32 × 32 ") and large.count("out of memory") == 2
    assert "out of memory" not in small and small.count("×") == 3
    assert plot.std() > 0.05 and loaded() == []


@pytest.mark.any_comfyui
def test_without_room_for_the_input_the_whole_size_is_reported(base, weights, monkeypatch):
    from comfyui_deltaconv.nodes.host import benchmark

    real = benchmark.site_calls

    def site_calls(patched, application, batch, size):
        if size[0] == 32:
            raise torch.OutOfMemoryError("out of memory")
        return real(patched, application, batch, size)

    monkeypatch.setattr(benchmark, "site_calls", site_calls)
    table, _ = run(base, weights, sizes="32, 8")
    large, small = table.split("\n")[4:6]
    assert large.count("out of memory") == 4 and "out of memory" not in small


@pytest.mark.parametrize("after", [1, 60])
def test_an_interrupt_leaves_the_model_as_it_was(base, weights, monkeypatch, after):
    import comfy.model_management
    import comfy.utils

    comfy.model_management.load_models_gpu([base])
    state, values = state_of(base), []

    def hook(value, total, *_, **__):
        assert total == 200
        values.append(value)
        if value >= after:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(base, weights, repeats=20)
    assert after <= values[-1] < 100
    assert loaded() == [base] and state_of(base) == state


@pytest.mark.any_comfyui
def test_without_matplotlib_the_table_still_comes(base, weights, monkeypatch):
    expected, _ = run(base, weights, sizes="8")
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    table, plot = run(base, weights, sizes="8")
    assert table.split("\n")[0] == expected.split("\n")[0]
    # The sentence itself, as a picture.
    assert plot.shape[2] == 760 and plot.min() < 0.2


def test_weights_of_another_model_are_refused_before_anything_is_loaded(base, weights):
    from dataclasses import replace

    with pytest.raises(ValueError, match="for Stable Diffusion XL"):
        run(base, replace(weights, family="sdxl"))
    assert loaded() == []


@pytest.mark.any_comfyui
def test_pixart_is_measured_in_whole_patches(pixart):
    from comfyui_deltaconv.deltaconv import DeltaConvBlock
    from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks

    blocks = {"blocks.1.attn": DeltaConvBlock(48, 5, gate="sigmoid")}
    table, _ = run(pixart, weights_of_blocks(blocks), sizes="256x384")
    assert "blocks by torch in 1 of 3 layers" in table
    assert table.split("\n")[4].startswith("| 256 × 384 ")
    assert "out of memory" not in table
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        run(pixart, weights_of_blocks(blocks), sizes="72")


@pytest.mark.any_comfyui
def test_a_model_that_reads_a_pooled_prompt_is_measured(as_comfyui_runs_nodes):
    from comfyui_deltaconv.deltaconv import DeltaConvBlock
    from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
    from comfyui_deltaconv.nodes.host.sites import find_sites

    name, config = REAL["sdxl"]
    model = randomize(host_model(name, config | SMALL["sdxl"]), 0.05)
    blocks = {path: DeltaConvBlock(dim, 3) for path, dim in find_sites(model).dims.items()}
    table, _ = run(model, weights_of_blocks(blocks), sizes="64", batch=1, repeats=1)
    assert table.split("\n")[4].count("one call") == 4


def test_it_runs_in_a_workflow_and_refuses_bad_sizes_there(server):
    from comfyui_deltaconv.development.comfyui.client import PromptRefused

    def graph(sizes):
        inputs = {"model": ["model", 0], "deltaconv": ["model", 1], "sizes": sizes, "batch": 1}
        nodes = {
            "model": ("DeltaConvDemoModel", {}),
            "bench": ("DeltaConvBenchmark", {**inputs, "repeats": 2, "seconds": 5.0}),
            "plot": ("PreviewImage", {"images": ["bench", 1]}),
        }
        return {name: {"class_type": k, "inputs": given} for name, (k, given) in nodes.items()}

    with pytest.raises(PromptRefused, match="such as 512, 1024 or 768x1024, got 'huge'"):
        server.queue(graph("8, huge"))
    outputs = server.queue(graph("8, 16"))["outputs"]
    (text,) = outputs["bench"]["text"]
    assert "8 × 8" in text and "16 × 16" in text
    assert len(outputs["plot"]["images"]) == 1
