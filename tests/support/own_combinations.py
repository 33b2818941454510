"""Combinations that no single change of a MODEL or sampling is: each gives its own word."""

import logging
import tempfile
from pathlib import Path

import pytest
import torch
from combinations import EXTRAS, Missing, dual_model_guider, find_node, first_value, node, sample_by
from host_models import stored_model
from outcomes import (
    BOTH_FAIL,
    BOTH_PASSES,
    INERT,
    LEFT,
    NOT_RUN,
    RESTS,
    WORKS,
    Told,
    counted,
    word_for,
)
from patched_models import apply
from safetensors import safe_open
from safetensors.torch import load_file


def loaded_again(case, stored=torch.float32):
    """The same weights as a MODEL of their own, as a second loader makes it."""
    model = case.model.model
    state = {name: each.clone() for name, each in model.diffusion_model.state_dict().items()}
    config = type(model.model_config)(dict(model.model_config.unet_config))
    return stored_model(config, state, stored, torch.float32)


def compiled(case, caplog):
    """TorchCompileModel after Apply ΔConv and before it, without what a backend makes of it."""
    compile_ = node(f"{EXTRAS}torch_compile", "TorchCompileModel", backend="eager")

    def sample(model):
        torch._dynamo.reset()
        return case.sample(model, steps=1, cfg=1.0)

    patched, _ = apply(case.model, case.weights)
    expected = sample(patched)
    try:
        for model in (
            compile_(case, patched),
            apply(compile_(case, case.model), case.weights)[0],
        ):
            torch.testing.assert_close(sample(model), expected)
    except AssertionError:
        raise
    except Exception as error:
        logging.getLogger(__name__).info("ours: %r", error)
        with pytest.raises(type(error)):
            sample(compile_(case, case.model))
        return BOTH_FAIL
    return WORKS


def eight_bits(case, caplog):
    """weight_dtype fp8_e4m3fn of the loaders."""
    model = loaded_again(case, torch.float8_e4m3fn)
    stored = {each.dtype for each in model.model.diffusion_model.parameters()}
    assert torch.float8_e4m3fn in stored
    alone = case.sample(model)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        patched, report = apply(model, case.weights)
        told = Told(report, caplog, counted(patched))
        result = case.sample(patched)
    assert torch.equal(case.sample(model), alone)
    return word_for(case, told, result, alone)


def every_sampler(case, caplog):
    """Every sampler that KSampler offers, by its number of block calls."""
    import comfy.samplers

    patched, _ = apply(case.model, case.weights)
    calls, model_calls = counted(patched), []

    def wrapper(apply_model, arguments):
        model_calls.append(arguments["cond_or_uncond"])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    patched.set_model_unet_function_wrapper(wrapper)
    for name in comfy.samplers.SAMPLER_NAMES:
        calls.clear()
        model_calls.clear()
        result = case.sample(patched, sampler=name, cfg=1.0)
        assert result.isfinite().all(), name
        assert len(calls) == len(model_calls) * len(case.weights.sites) > 0, name
    return WORKS


def saved(case, caplog):
    """What ModelSave writes, which CheckpointSave writes beside a CLIP and a VAE."""
    from comfy_extras.nodes_model_merging import ModelSave

    files = []
    patched, _ = apply(case.model, case.weights)
    caplog.clear()
    for model in (case.model, patched):
        with tempfile.TemporaryDirectory() as folder, caplog.at_level(logging.INFO):
            node = ModelSave()
            node.output_dir = folder
            node.save(model, "model")
            (file,) = Path(folder).glob("*.safetensors")
            with safe_open(file, "pt") as opened:
                files.append((load_file(file), opened.metadata()))
    # The model's own file, bit for bit: loaded, it has self-attention.
    (stock, metadata), (ours, same) = files
    assert metadata == same and stock.keys() == ours.keys()
    # As bytes: what Anima's text modules hold, which no one has set, may be NaN.
    assert all(torch.equal(_bytes(each), _bytes(ours[name])) for name, each in stock.items())
    assert caplog.text.count("the file is the model with self-attention and without blocks") == 1
    return LEFT


def _bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def second_of_a_merge(case, caplog):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    patched, _ = apply(case.model, case.weights)
    calls = counted(patched)
    expected = case.sample(ModelMergeSimple().merge(case.model, case.model.clone(), 0.5)[0])
    caplog.clear()
    with caplog.at_level(logging.INFO):
        merged = ModelMergeSimple().merge(case.model, patched, 0.5)[0]
    assert torch.equal(case.sample(merged), expected) and not calls
    assert caplog.text.count("Connect Apply ΔConv after the merge") == 1
    return LEFT


def lora_training(case, caplog):
    """One step of core's TrainLoraNode."""
    try:
        stock = _trained(case, loaded_again(case))
    except Missing:
        raise
    except Exception as error:
        logging.getLogger(__name__).info("stock: %r", error)
        return BOTH_FAIL
    patched, _ = apply(loaded_again(case), case.weights)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ours = _trained(case, patched)
    prefixes = tuple(f"diffusion_model.{site}." for site in case.weights.sites)
    # These begin as zeros.
    downs = {name: bool(each.any()) for name, each in stock.items() if "lora_down" in name}
    assert any(trained for name, trained in downs.items() if name.startswith(prefixes))
    for name, trained in downs.items():
        assert bool(ours[name].any()) == (trained and not name.startswith(prefixes)), name
    assert caplog.text.count("stays untrained where blocks run") == 1
    return INERT


def _trained(case, model):
    """Name → tensor of the LoRA after one step."""
    from comfy_extras import nodes_train

    node = find_node(nodes_train, "TrainLoraNode")
    defaults = {entry.id: [first_value(entry)] for entry in node.define_schema().inputs}
    inputs = {
        **{"model": model, "latents": {"samples": case.latent + 0.5}, "positive": case.positive},
        **{"steps": 1, "rank": 1, "training_dtype": "fp32", "lora_dtype": "fp32"},
        **{"learning_rate": 0.1, "gradient_checkpointing": False, "existing_lora": "[None]"},
    }
    values = {**defaults, **{name: [value] for name, value in inputs.items()}}
    return node.execute(**values).args[0]


def two_bases(case, caplog):
    """Dual Model CFG Guider with a model of its own for each pass."""
    patched, _ = apply(case.model, case.weights)
    calls, other = counted(patched), loaded_again(case)
    caplog.clear()
    alone = sample_by(dual_model_guider(case, case.model, other), case)
    result = sample_by(dual_model_guider(case, patched, other), case)
    assert len(calls) == 2 * len(case.weights.sites) and "Dual Model" not in caplog.text
    assert not torch.equal(result, alone)
    return WORKS


def second_of_two_bases(case, caplog):
    """ComfyUI calls the second model with the first one's wrappers, where some maps are noted."""
    patched, _ = apply(case.model, case.weights)
    calls, other = counted(patched), loaded_again(case)
    caplog.clear()
    alone = sample_by(dual_model_guider(case, case.model, other), case)
    result = sample_by(dual_model_guider(case, other, patched), case)
    if not calls:
        assert caplog.text.count("as in the second model of Dual Model CFG Guider") == 1
        assert torch.equal(result, alone)
        return RESTS
    assert len(calls) == 2 * len(case.weights.sites) and "Dual Model" not in caplog.text
    assert not torch.equal(result, alone)
    return WORKS


def blocks_on_the_first(case, caplog):
    """Dual Model CFG Guider with two clones of one base."""
    patched, _ = apply(case.model, case.weights)
    calls = counted(patched)
    caplog.clear()
    result = sample_by(dual_model_guider(case, patched, case.model), case)
    assert len(calls) == 4 * len(case.weights.sites)
    assert torch.equal(result, sample_by(dual_model_guider(case, patched, patched), case))
    assert caplog.text.count("blocks run in the second as well") == 1
    return BOTH_PASSES


def blocks_on_the_second(case, caplog):
    patched, _ = apply(case.model, case.weights)
    calls = counted(patched)
    caplog.clear()
    alone = sample_by(dual_model_guider(case, case.model, case.model), case)
    assert torch.equal(sample_by(dual_model_guider(case, case.model, patched), case), alone)
    assert not calls and caplog.text.count("no block of this MODEL ran") == 1
    return RESTS


def cuda_graph(case, caplog):
    """Our own CUDA Graph Replay, on a CPU: every call as usual, said."""
    from comfyui_deltaconv.nodes.cuda_graph import DeltaConvCudaGraph

    patched, _ = apply(case.model, case.weights)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        (replaying,) = DeltaConvCudaGraph.execute(patched).args
        assert torch.equal(case.sample(replaying), case.sample(patched))
    assert "where there are no CUDA graphs" in caplog.text
    return NOT_RUN


COMPILED = "torch.compile (backend eager)"
# Rows that load the model again or go through all of its weights.
LOADING = {
    "fp8 weights": eight_bits,
    "CheckpointSave, ModelSave": saved,
    "ΔConv on a merge's second model": second_of_a_merge,
    "Train LoRA": lora_training,
    "Dual Model CFG Guider, two bases, ΔConv on the first": two_bases,
    "Dual Model CFG Guider, two bases, ΔConv on the second": second_of_two_bases,
}
# Row → what gives its word.
OWN = {
    COMPILED: compiled,
    "every sampler of KSampler": every_sampler,
    **LOADING,
    "Dual Model CFG Guider, two clones of one base, ΔConv on the first": blocks_on_the_first,
    "Dual Model CFG Guider, two clones of one base, ΔConv on the second": blocks_on_the_second,
    "CUDA Graph Replay": cuda_graph,
}
