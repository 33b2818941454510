"""The file format: what it reads, writes and refuses, and that a refusal does no harm."""

import json
import os
import pickle
import struct
from dataclasses import replace

import pytest
import torch
from comfyui_deltaconv.deltaconv import (
    DeltaConvBlock,
    WeightsError,
    demo,
    read_weights,
    write_weights,
)
from comfyui_deltaconv.deltaconv.families import FAMILIES
from comfyui_deltaconv.deltaconv.weights import file as weight_file
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import published_paths
from safetensors import safe_open
from safetensors.torch import load_file, save_file

KERNEL = 3


def block_state(dim, kernel=KERNEL, scales=2, seed=0):
    torch.manual_seed(seed)
    return DeltaConvBlock(dim, kernel, (1.0, 0.5, 1 / 3)[:scales]).half().state_dict()


def published(family, prefix="", sites=2, seed=0):
    """A file as the authors publish it, for the first few sites of a family."""
    paths = list(published_paths(family).items())[:sites]
    dims = FAMILIES[family].dims
    return {
        f"{prefix}{path}.conv1.{name}": tensor
        for site, path in paths
        for name, tensor in block_state(dims[site], seed=seed).items()
    }


def save(path, tensors, metadata=None):
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, path, metadata=metadata)
    return path


@pytest.fixture
def own(tmp_path):
    """A small file in our own format."""
    torch.manual_seed(0)
    blocks = {
        "input_blocks.1.1.transformer_blocks.0.attn1": DeltaConvBlock(8, 3),
        "middle_block.1.transformer_blocks.0.attn1": DeltaConvBlock(16, 5, (1.0, 0.25)),
    }
    weights = weights_of_blocks(blocks, family="tiny", base_model="β", training={"steps": 3})
    return write_weights(weights, tmp_path / "own.safetensors")


def test_the_packaged_weights_say_what_they_are():
    weights = read_weights(demo.DELTACONV_PATH)
    assert len(weights.sites) == 10
    assert weights.families == (demo.FAMILY,)
    assert weights.gate == "scaled"
    assert "demo" in weights.base_model.lower()
    assert [g.kernel_size for g in weights.sites.values()] == [11, 9, 7, 7, 7, 7, 9, 9, 11, 11]
    assert weights.parameters == sum(
        tensor.numel() for site in weights.sites for tensor in weights.state(site).values()
    )


def test_own_format_round_trips(own, tmp_path):
    weights = read_weights(own)
    assert list(weights.sites.values())[1].kernel_size == 5
    assert weights.scales["middle_block.1.transformer_blocks.0.attn1"] == (1.0, 0.25)
    assert (weights.family, weights.base_model, weights.training) == ("tiny", "β", {"steps": 3})
    again = read_weights(write_weights(weights, tmp_path / "again.safetensors"))
    assert replace(again, tensors={}, source="") == replace(weights, tensors={}, source="")
    for site in weights.sites:
        state = again.state(site)
        assert all(torch.equal(state[n], t) for n, t in weights.state(site).items())


@pytest.mark.parametrize(
    "prefix", ["", "unet.", "denoiser.", "model.", "transformer.", "base:", "base:denoiser."]
)
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl-refiner", "pixart"])
def test_published_files_are_read_under_any_prefix(tmp_path, family, prefix):
    tensors = published(family, prefix)
    weights = read_weights(save(tmp_path / "p.safetensors", tensors))
    assert list(weights.sites) == list(FAMILIES[family].dims)[:2]
    assert family in weights.families
    assert weights.gate == FAMILIES[family].gate
    assert all(scales == (1.0, 0.5) for scales in weights.scales.values())
    site, path = next(iter(published_paths(family).items()))
    expected = tensors[f"{prefix}{path}.conv1.conv_out.weight"]
    assert torch.equal(weights.state(site)["conv_out.weight"], expected)


def test_the_ema_set_is_preferred_and_other_weights_are_ignored(tmp_path):
    ema, plain = published("sd1", "base_ema:", seed=1), published("sd1", "base:", seed=2)
    other = {
        "base:down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight": torch.ones(2),
        "base:conv_in.weight": torch.ones(3),
        "base:conv_out.weight": torch.ones(3),
    }
    weights = read_weights(save(tmp_path / "p.safetensors", {**plain, **ema, **other}))
    site, path = next(iter(published_paths("sd1").items()))
    expected = ema[f"base_ema:{path}.conv1.conv_up.weight"]
    assert torch.equal(weights.state(site)["conv_up.weight"], expected)
    assert len(weights.sites) == 2


def test_plain_torch_layouts_are_read(tmp_path):
    tensors = published("sdxl")
    turned = {
        name: tensor.permute(2, 0, 1)[:, None]
        if tensor.ndim == 3
        else (tensor[:, :, None, None] if tensor.ndim == 2 else tensor)
        for name, tensor in tensors.items()
    }
    a = read_weights(save(tmp_path / "a.safetensors", tensors))
    b = read_weights(save(tmp_path / "b.safetensors", turned))
    assert a.sites == b.sites
    for site in a.sites:
        state = b.state(site)
        assert all(torch.equal(state[name], tensor) for name, tensor in a.state(site).items())


@given(st.floats(0, 1, exclude_max=True))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_start_is_kept_and_absent_where_blocks_always_act(own, start):
    weights = replace(read_weights(own), start=start)
    path = write_weights(weights, own.with_stem("late"), overwrite=True)
    assert read_weights(path).start == start
    with safe_open(path, "pt") as file:
        assert ("deltaconv.start" in file.metadata()) == (start > 0)
    assert read_weights(own).start == 0


@pytest.mark.parametrize("start", [1.0, -0.1, float("nan"), float("inf")])
def test_a_start_at_which_blocks_never_act_is_refused(own, start):
    with pytest.raises(WeightsError, match="Blocks would never act"):
        replace(read_weights(own), start=start)


def test_some_blocks_alone_keep_what_they_are(own, tmp_path):
    weights = read_weights(own)
    site = next(iter(weights.sites))
    some = read_weights(write_weights(weights.only([site], 0.3), tmp_path / "some.safetensors"))
    assert (set(some.sites), some.scales[site]) == ({site}, weights.scales[site])
    assert (some.start, some.family, some.base_model) == (0.3, "tiny", "β")
    for name, tensor in weights.state(site).items():
        assert torch.equal(some.state(site)[name], tensor)


def test_a_metadata_entry_overrides_the_gate(tmp_path):
    path = save(tmp_path / "p.safetensors", published("sd1"), {"deltaconv.gate": "sigmoid"})
    assert read_weights(path).gate == "sigmoid"


def test_headers_are_read_without_tensors(tmp_path):
    """A file whose tensors are gone to zeros on disk is described all the same."""
    path = save(tmp_path / "p.safetensors", published("sdxl"))
    weights = read_weights(path)
    nan = {name: torch.full_like(t, torch.nan) for name, t in load_file(path).items()}
    save(path, nan)
    again = read_weights(path)
    assert again.sites == weights.sites
    with pytest.raises(WeightsError, match="NaN or infinite"):
        again.state(next(iter(again.sites)))


def overwritten(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))
    return path


@pytest.mark.parametrize("low", [*range(0, 256, 8), 0x4B50])
def test_any_length_of_the_header_is_read(own, low):
    """A file begins with that length, whose bytes may be those of a pickle or a zip archive."""
    content = own.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    modulus = 256 if low < 256 else 65536
    padded = length + (low - length) % modulus
    header = content[8 : 8 + length].ljust(padded)
    own.write_bytes(struct.pack("<Q", padded) + header + content[8 + length :])
    assert len(read_weights(own).sites) == 2


def test_what_is_no_safetensors_file_is_refused_and_never_unpickled(tmp_path):
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    for name, data in {
        "old.safetensors": pickle.dumps(Payload()),
        "empty.safetensors": b"",
        "text.safetensors": b"not a model at all, just some words",
        "html.safetensors": b"<!DOCTYPE html><html>" + b" " * 100,
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsError, match=name):
            read_weights(tmp_path / name)
    torch.save({"a": torch.zeros(1)}, tmp_path / "new.safetensors")
    with pytest.raises(WeightsError, match="never opened"):
        read_weights(tmp_path / "new.safetensors")
    assert not marker.exists()


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(WeightsError, match="Cannot read"):
            read_weights(path)


def test_truncated_and_lying_headers_are_refused(own):
    data = own.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(k for k in header if k != "__metadata__")

    def with_header(h):
        text = json.dumps(h).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    longer = {**header, name: {**header[name], "data_offsets": [0, 10**9]}}
    wider = {**header, name: {**header[name], "shape": [999, 999]}}
    cases = [
        data[:-1],
        data[: 8 + length // 2],
        data[:4],
        struct.pack("<Q", 2**62) + data[8:],
        with_header(longer),
        with_header(wider),
    ]
    for case in cases:
        own.write_bytes(case)
        with pytest.raises(WeightsError, match="header cannot be trusted"):
            read_weights(own)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"deltaconv.format": "2"}, "format version 1"),
        ({"deltaconv.gate": "relu"}, "a gate out of"),
        ({"deltaconv.start": "1"}, "a start of at least 0 and below 1"),
        ({"deltaconv.start": "-0.1"}, "a start of at least 0 and below 1"),
        ({"deltaconv.start": "nan"}, "a start of at least 0 and below 1"),
        ({"deltaconv.start": "1e-1"}, "a start of at least 0 and below 1"),
        ({"deltaconv.start": ""}, "a start of at least 0 and below 1"),
        ({"deltaconv.start": "0." + "9" * 400}, "a start of at least 0 and below 1"),
        ({"deltaconv.sites": "["}, "JSON under"),
        ({"deltaconv.sites": "[" * 100_000}, "JSON under"),
        ({"deltaconv.sites": "[]"}, "JSON object"),
        ({"deltaconv.training": "3"}, "JSON object"),
        ({"deltaconv.sites": '{"SITE": 3}'}, "kernel and scales"),
        ({"deltaconv.sites": '{"SITE": {"kernel": 7}}'}, "kernel 3"),
        ({"deltaconv.sites": '{"SITE": {"scales": [1]}}'}, "2 scales"),
        ({"deltaconv.sites": '{"SITE": {"scales": [1, 2]}}'}, "2 scales"),
        ({"deltaconv.sites": '{"SITE": {"scales": [1, "x"]}}'}, "2 scales"),
        ({"deltaconv.sites": '{"SITE": {"scales": 1}}'}, "2 scales"),
        ({"deltaconv.sites": '{"SITE": {"scales": [1, true]}}'}, "2 scales"),
    ],
)
def test_metadata_that_the_tensors_contradict_is_refused(tmp_path, metadata, sentence):
    site = "blocks.0.attn"
    tensors = {f"{site}.{name}": tensor for name, tensor in block_state(8).items()}
    metadata = {key: text.replace("SITE", site) for key, text in metadata.items()}
    path = save(tmp_path / "x.safetensors", tensors, {"deltaconv.format": "1", **metadata})
    with pytest.raises(WeightsError, match=sentence):
        read_weights(path)


def test_files_without_blocks_are_refused(tmp_path):
    teacher = demo.TEACHER_PATH
    vae = {
        "decoder.conv_out.weight": torch.ones(3, 4, 3, 3),
        "decoder.conv_out.bias": torch.ones(3),
    }
    lora = {"lora_unet_x.lora_up.weight": torch.ones(2, 2)}
    paths = [teacher, *(save(tmp_path / f"{i}.safetensors", t) for i, t in enumerate((vae, lora)))]
    for path in paths:
        with pytest.raises(WeightsError, match="none of a block"):
            read_weights(path)
    with pytest.raises(WeightsError, match="got 0 tensors"):
        read_weights(save(tmp_path / "none.safetensors", {}))


def test_blocks_of_no_known_family_are_refused(tmp_path):
    wide = {
        f"down_blocks.0.attentions.0.transformer_blocks.0.conv1.{name}": tensor
        for name, tensor in block_state(64).items()
    }
    with pytest.raises(WeightsError, match="fit none of them"):
        read_weights(save(tmp_path / "wide.safetensors", wide))
    deep = {
        f"down_blocks.9.attentions.0.transformer_blocks.0.conv1.{name}": tensor
        for name, tensor in block_state(320).items()
    }
    with pytest.raises(WeightsError, match=r"down_blocks\.9"):
        read_weights(save(tmp_path / "deep.safetensors", deep))


def test_competing_sets_are_refused(tmp_path):
    tensors = {**published("sd1", "unet."), **published("sd1", "denoiser.")}
    with pytest.raises(WeightsError, match="one set of ΔConv blocks"):
        read_weights(save(tmp_path / "two.safetensors", tensors))


def test_kernels_that_differ_within_a_block_are_refused(tmp_path):
    tensors = published("sd1", sites=1)
    name = next(k for k in tensors if "gates.1." in k)
    tensors[name] = torch.zeros(5, 5, 160, dtype=torch.float16)
    with pytest.raises(WeightsError, match="one kernel size per block"):
        read_weights(save(tmp_path / "k.safetensors", tensors))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_other_dtypes_are_refused_by_name(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in published("sd1", sites=1).items()}
    with pytest.raises(WeightsError, match="BF16, F16, F32, F64"):
        read_weights(save(tmp_path / "d.safetensors", tensors))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_before_anything_is_written(own, tmp_path, value):
    weights = read_weights(own)
    site = next(iter(weights.sites))
    state = weights.state(site)
    state["conv_out.bias"][0] = value
    broken = replace(weights, tensors={**weights.tensors, site: state})
    target = tmp_path / "broken.safetensors"
    with pytest.raises(WeightsError, match=r"conv_out\.bias"):
        write_weights(broken, target)
    with pytest.raises(WeightsError, match=r"conv_out\.bias"):
        broken.block(site)
    assert not target.exists()


def test_writing_never_overwrites_unless_asked(own, tmp_path):
    weights, before = read_weights(own), own.read_bytes()
    with pytest.raises(FileExistsError, match="allow overwriting"):
        write_weights(weights, own)
    assert own.read_bytes() == before
    write_weights(replace(weights, base_model="other"), own, overwrite=True)
    assert read_weights(own).base_model == "other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own.safetensors"]
    with pytest.raises(WeightsError, match="ends in"):
        write_weights(weights, tmp_path / "x.pt")


def test_a_name_taken_while_writing_is_not_overwritten(own, tmp_path, monkeypatch):
    weights, target = read_weights(own), tmp_path / "late.safetensors"
    real = weight_file.save

    def slow(*args, **kwargs):
        target.write_bytes(b"somebody else's")
        return real(*args, **kwargs)

    monkeypatch.setattr(weight_file, "save", slow)
    with pytest.raises(FileExistsError):
        write_weights(weights, target)
    assert target.read_bytes() == b"somebody else's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["late.safetensors", "own.safetensors"]


def test_a_failed_write_leaves_nothing_behind(own, tmp_path, monkeypatch):
    weights = read_weights(own)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_weights(weights, tmp_path / "new.safetensors")
    with pytest.raises(OSError, match="No space"):
        write_weights(weights, own, overwrite=True)
    monkeypatch.undo()
    assert read_weights(own).sites == weights.sites
    assert [p.name for p in tmp_path.iterdir()] == ["own.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_written_files_have_the_permissions_of_any_other_file(own, tmp_path):
    other = tmp_path / "other"
    other.touch()
    assert own.stat().st_mode == other.stat().st_mode


def damaged(data, edits):
    data = bytearray(data)
    for position, value in edits:
        data[position % len(data)] = value
    return bytes(data)


def reads_or_refuses(path):
    """Whatever the bytes are: weights that can be used, or one WeightsError."""
    try:
        weights = read_weights(path)
        for site in weights.sites:
            weights.block(site)
    except WeightsError:
        pass


edits = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=edits, cut=st.integers(0, 200))
def test_damaged_files_never_do_worse_than_refuse(own, tmp_path, edits, cut):
    data = damaged(own.read_bytes(), edits)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data[: len(data) - cut] if cut > 100 else data)
    reads_or_refuses(path)


@pytest.mark.long
@settings(
    max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=edits, cut=st.integers(0, 200))
def test_damaged_files_never_do_worse_than_refuse_long(own, tmp_path, edits, cut):
    data = damaged(own.read_bytes(), edits)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data[: len(data) - cut] if cut > 100 else data)
    reads_or_refuses(path)
