"""Benchmark ΔConv: what it measures, how it goes on where memory ends, how it leaves a MODEL."""

import gc
import sys
import weakref

import pytest
import torch
from comfyui_deltaconv.deltaconv import demo
from comfyui_deltaconv.deltaconv.application import step_times
from comfyui_deltaconv.deltaconv.application.step_times import CONTENDERS, Contender, SizeTimes

CPU = torch.device("cpu")
STEP, BLOCKS = CONTENDERS[:2]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", []),
        ("512", [(512, 512)]),
        (" 512, 768x1024;\n1024 X 768 , 768×1024,", [(512, 512), (768, 1024), (1024, 768)]),
    ],
)
def test_sizes_are_read(text, sizes):
    assert step_times.parse_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("512, big", "such as 512, 1024 or 768x1024, got 'big'"),
        ("512x", "got '512x'"),
        ("-8", "got '-8'"),
        ("0", "from 1 to 16384 pixels, got '0'"),
        ("512x20000", "got '512x20000'"),
        (", ".join(map(str, range(8, 8 * 18, 8))), "at most 16 sizes, got 17"),
    ],
)
def test_what_is_no_size_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        step_times.parse_sizes(text)


def test_pixels_become_latent_cells():
    assert step_times.latent_size((768, 1024), 8) == (128, 96)
    assert step_times.latent_size((768, 1024), 8, 2) == (128, 96)
    with pytest.raises(ValueError, match=r"multiples of 16 pixels .* got 1000 x 1024\. Take 992 x"):
        step_times.latent_size((1000, 1024), 8, 2)


def test_calls_take_turns_and_progress_ends_at_the_total():
    order, steps = [], []
    calls = {name: lambda name=name: order.append(name) for name in CONTENDERS}
    result = SizeTimes((8, 8))
    step_times.measure(result, calls, CPU, 3, 60.0, lambda *step: steps.append(step))
    assert order == list(CONTENDERS) * 4
    assert steps == [(n, 16) for n in range(1, 17)]
    assert {timing["samples"] for timing in result.times.values()} == {3}


def test_time_limits():
    calls = {name: lambda: None for name in CONTENDERS}
    result = step_times.measure(SizeTimes((8, 8)), calls, CPU, 50, 0.0)
    assert {timing["samples"] for timing in result.times.values()} == {1}
    slow = torch.ones(400, 400)
    calls[STEP] = lambda: [slow @ slow for _ in range(100)]
    result = step_times.measure(SizeTimes((8, 8)), calls, CPU, 5, 0.002)
    assert result.times[STEP]["samples"] == 1
    assert "(one call)" in step_times.table([result])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Not enough memory, use lower resolution (max approx. 512x512)."),
    ],
)
@pytest.mark.parametrize("when", [1, 3])
def test_out_of_memory_ends_one_contender_alone(error, when):
    count = []

    def fails():
        count.append(1)
        if len(count) >= when:
            raise error

    calls = {name: lambda: None for name in CONTENDERS} | {STEP: fails}
    result = step_times.measure(SizeTimes((8, 8)), calls, CPU, 4, 60.0)
    assert result.problems == {STEP: "out of memory"}
    assert len(count) == when
    assert all(result.times[name]["samples"] == 4 for name in CONTENDERS[1:])
    assert "out of memory" in step_times.table([result])
    assert result.ratio("step") is None


def test_other_errors_and_interrupts_are_not_swallowed():
    def raises(error):
        raise error

    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")):
        with pytest.raises(type(error)):
            step_times.measure(
                SizeTimes((8, 8)), {STEP: lambda error=error: raises(error)}, CPU, 1, 1.0
            )
    with pytest.raises(KeyboardInterrupt):
        step_times.measure(
            SizeTimes((8, 8)),
            {STEP: lambda: None},
            CPU,
            1,
            1.0,
            lambda *_: raises(KeyboardInterrupt),
        )


def timed(size, attention, blocks, spread=0.01):
    """A size whose two steps took that many seconds."""
    times = {
        Contender("step", way): {
            "median": value,
            "low": value * (1 - spread),
            "high": value * (1 + spread),
            "samples": 5,
        }
        for way, value in zip(step_times.WAYS, (attention, blocks), strict=True)
    }
    return SizeTimes((size, size), times)


def test_the_table_says_who_is_faster_and_by_how_much():
    results = [timed(512, 0.02, 0.025), timed(768, 0.05, 0.0501), timed(1024, 0.2, 0.05)]
    results[2].memory = {STEP: 3 * 2**30, BLOCKS: 2**29}
    text = step_times.table(results)
    lines = text.split("\n")
    assert "0.80×" in lines[1] and "20 (19.8–20.2)" in lines[1]
    assert "4.00×" in lines[3] and lines[3].split()[-4:] == ["3072", "MiB", "512", "MiB"]
    assert "with ΔConv at 1024 × 1024." in text
    assert "with attention at 512 × 512: choose" in text
    assert "less than the spread at 768 × 768." in text
    assert "memory" not in step_times.table(results[:2]).lower()


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
    assert table.split("\n\n")[1].split("\n")[1].split()[:3] == ["8", "×", "8"]
    assert plot.shape[0] == 1 and plot.shape[-1] == 3 and plot.std() > 0.05


@pytest.mark.any_comfyui
def test_no_sizes_means_the_usual_ones(base, weights, monkeypatch):
    monkeypatch.setattr(demo, "NATIVE_SIZE", 8)
    table, _ = run(base, weights, sizes="")
    assert [line.split("×")[0].strip() for line in table.split("\n")[3:5]] == ["8", "16"]


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
    large, small = table.split("\n")[3:5]
    assert large.split()[:3] == ["32", "×", "32"] and large.count("out of memory") == 2
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
    large, small = table.split("\n")[3:5]
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
def test_pixart_is_measured_in_whole_patches(as_comfyui_runs_nodes):
    import comfy.model_patcher
    import comfy.supported_models
    from comfyui_deltaconv.deltaconv import DeltaConvBlock
    from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks

    config = comfy.supported_models.PixArtSigma(
        {
            "image_model": "pixart_sigma",
            "depth": 2,
            "hidden_size": 48,
            "num_heads": 4,
            "input_size": 16,
            "micro_condition": False,
            "caption_channels": 32,
            "model_max_length": 8,
            "pe_interpolation": 1,
        }
    )
    made = config.get_model({}, "", device="cpu")
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    model = comfy.model_patcher.ModelPatcher(made, CPU, CPU)
    blocks = {"blocks.1.attn": DeltaConvBlock(48, 5, gate="sigmoid")}
    table, _ = run(model, weights_of_blocks(blocks), sizes="256x384")
    assert "blocks by torch in 1 of 2 layers" in table
    assert table.split("\n")[3].split()[:3] == ["256", "×", "384"]
    assert "out of memory" not in table
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        run(model, weights_of_blocks(blocks), sizes="72")


@pytest.mark.any_comfyui
def test_a_model_that_reads_a_pooled_prompt_is_measured(as_comfyui_runs_nodes):
    import comfy.model_patcher
    import comfy.supported_models
    from comfyui_deltaconv.benchmarks.models import MODELS
    from comfyui_deltaconv.deltaconv import DeltaConvBlock
    from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
    from comfyui_deltaconv.nodes.host.sites import find_sites

    name, config = MODELS["sdxl"][:2]
    small = {
        "model_channels": 32,
        "context_dim": 48,
        "transformer_depth": [0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    }
    made = getattr(comfy.supported_models, name)(config | small).get_model({}, "", device="cpu")
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.05)
    model = comfy.model_patcher.ModelPatcher(made, CPU, CPU)
    blocks = {path: DeltaConvBlock(dim, 3) for path, dim in find_sites(model).dims.items()}
    table, _ = run(model, weights_of_blocks(blocks), sizes="64", batch=1, repeats=1)
    assert table.split("\n")[3].count("one call") == 4


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


SMALL_MODELS = {
    "sd1": {"model_channels": 32, "context_dim": 48},
    "sdxl": {
        "model_channels": 32,
        "context_dim": 48,
        "transformer_depth": [0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    },
    "pixart": {"depth": 2, "hidden_size": 32, "num_heads": 2},
}


@pytest.fixture
def step_entry(as_comfyui_runs_nodes, monkeypatch):
    """What is measured of steps of a small model of that family at that many pixels."""
    from comfyui_deltaconv.benchmarks import model_steps, models

    small = {
        family: (name, config | SMALL_MODELS[family], sizes)
        for family, (name, config, sizes) in models.MODELS.items()
    }
    monkeypatch.setattr(models, "MODELS", small)
    # However busy the machine is.
    monkeypatch.setattr(model_steps, "LONG_STEP", 1e9)
    monkeypatch.setattr(model_steps, "LONGEST_STEP", 1e9)

    def measure(family, pixels, repeats=2, batch=2):
        torch.manual_seed(0)
        patcher = models.build(family, torch.float32, CPU)
        return model_steps.measure(family, pixels, patcher, torch.float32, batch, repeats)

    return measure


@pytest.mark.any_comfyui
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
    assert list(entry["steps"]) == ["stock", "tome 0.3", "deltaconv"]
    # A round that is not counted, then three; the blocks run in none but ours.
    assert order == [0, 0, 16] * 4
    assert {timing["samples"] for timing in entry["steps"].values()} == {3}
    assert (entry["batch"], entry["dtype"]) == (2, "float32")
    assert entry["left_out"].keys() == {"hypertile 256, depth 0"}  # the map is one tile


@pytest.mark.any_comfyui
def test_what_does_nothing_to_a_model_is_not_timed_as_an_alternative(step_entry):
    # SDXL has no attention at full resolution, where ToMe acts, and here its maps are one tile.
    entry = step_entry("sdxl", 64, repeats=1, batch=1)
    assert list(entry["steps"]) == ["stock", "deltaconv"]
    sentence = "no effect: its output is that of stock"
    assert entry["left_out"] == {"tome 0.3": sentence, "hypertile 256, depth 2": sentence}


@pytest.mark.parametrize(("family", "side"), [("sd1", 64), ("sdxl", 32), ("sdxl", 64)])
def test_hypertile_acts_where_the_family_has_attention(base, family, side):
    from comfyui_deltaconv.benchmarks import model_steps

    (tiled,) = (m for name, m in model_steps.instead(family, base).items() if "hyper" in name)
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


def test_a_transformer_has_stock_and_blocks_alone(step_entry):
    entry = step_entry("pixart", 512, repeats=1)
    assert list(entry["steps"]) == ["stock", "deltaconv"] and "sampling" not in entry


@pytest.mark.any_comfyui
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
