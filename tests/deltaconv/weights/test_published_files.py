"""Files as the authors name them: whole families at real size, sparse on disk."""

import itertools
import json
import struct

import pytest
import torch
from comfyui_deltaconv.deltaconv import WeightsError, read_weights
from comfyui_deltaconv.deltaconv.families import FAMILIES
from comfyui_deltaconv.deltaconv.geometry import BlockGeometry
from published import published_paths

SITES = {"sd1": 16, "sdxl": 70, "pixart": 28}
PREFIXES = [
    "".join(parts)
    for parts in itertools.product(
        ("", "base:", "base_ema:"), ("", "denoiser.", "unet.", "model.", "transformer.")
    )
]
DIGITS = [
    "models.0.",
    "unet2.",
    "0.",
    "base_ema:unet-2.",
    "_orig_mod.",
    "a1:b2:nets.3.unet.",
    "my model 2.",
]
ONE_SCALE, ALL_SCALES = (1,), (0, 1)


def block_shapes(dim, kernel, layout="published", depthwise_bias=(), up_bias=True):
    """Published tensor name → shape of one block with two scales, in one of its layouts."""
    shapes = dict(BlockGeometry(dim, kernel, 2).shapes())
    shapes.pop("conv_up.bias", None)
    if up_bias:
        shapes["conv_up.bias"] = (dim // 2,)
    shapes |= {f"gates.{scale}.conv_spatial.bias": (dim // 2,) for scale in depthwise_bias}
    if layout == "published":
        return shapes
    return {
        name: (shape[2], 1, *shape[:2])
        if len(shape) == 3
        else (*shape, 1, 1)
        if len(shape) == 2
        else shape
        for name, shape in shapes.items()
    }


def published(family, prefix="", **variant):
    """Key → shape of all blocks of a family."""
    known = FAMILIES[family]
    return {
        f"{prefix}{path}.conv1.{name}": shape
        for site, path in published_paths(family).items()
        for name, shape in block_shapes(
            known.dims[site], known.published_kernel(site), **variant
        ).items()
    }


def frozen(family, prefix=""):
    """Key → shape of what else stands in the file where the trainer saved the whole model."""
    other = ("norm1.weight", "attn2.to_q.weight", "attn2.to_out.0.bias", "ff.net.0.proj.weight")
    paths = published_paths(family).values()
    shapes = {f"{prefix}{path}.{name}": (8, 8) for path in paths for name in other}
    resnets = ("conv1.weight", "conv1.bias", "conv2.weight", "time_emb_proj.weight")
    for level, name in itertools.product(range(3), resnets):
        shapes[f"{prefix}down_blocks.{level}.resnets.0.{name}"] = (8, 8)
        shapes[f"{prefix}up_blocks.{level}.resnets.2.{name}"] = (8, 8)
    shapes |= {f"{prefix}{name}": (8,) for name in ("conv_in.weight", "conv_out.bias")}
    return shapes | {f"{prefix}conv_out.weight": (8, 8), f"{prefix}pos_embed.proj.weight": (8, 8)}


def write(path, shapes, value=lambda number: number):
    """fp16 tensors of zeros whose first value is `value(number of the tensor)`; holes elsewhere."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, entry in enumerate(header.values()):
            file.seek(8 + len(text) + entry["data_offsets"][0])
            file.write(struct.pack("<e", value(number)))
        file.truncate(8 + len(text) + end)
    return path


def check(weights, family, shapes, prefix):
    """All sites, in network order, with their geometry, and every tensor the file's own."""
    known = FAMILIES[family]
    assert list(weights.sites) == list(known.dims) and len(weights.sites) == SITES[family]
    assert family in weights.families
    assert weights.base_model == known.published_base
    assert weights.gate == known.gate
    numbers = {key: number for number, key in enumerate(shapes)}
    for site, path in published_paths(family).items():
        geometry = weights.sites[site]
        expected = (known.dims[site], known.published_kernel(site), 2)
        assert (geometry.dim, geometry.kernel_size, geometry.num_scales) == expected
        assert weights.scales[site] == (1.0, 0.5)
        start = f"{prefix}{path}.conv1."
        names = {key[len(start) :] for key in shapes if key.startswith(start)}
        tensors = dict(weights.tensors[site].items())
        assert tensors.keys() == names
        for name, tensor in tensors.items():
            assert tensor.flatten()[0].item() == numbers[start + name] % 2048


@pytest.mark.parametrize("prefix", PREFIXES + DIGITS)
@pytest.mark.parametrize("family", SITES)
def test_all_sites_load_under_every_prefix(tmp_path, family, prefix):
    shapes = published(family, prefix)
    path = write(tmp_path / "p.safetensors", shapes, lambda number: number % 2048)
    check(read_weights(path), family, shapes, prefix)


@pytest.mark.parametrize("up_bias", [True, False], ids=["up-bias", "no-up-bias"])
@pytest.mark.parametrize(
    "depthwise_bias", [(), ONE_SCALE, ALL_SCALES], ids=["no-bias", "one-bias", "biases"]
)
@pytest.mark.parametrize("layout", ["published", "torch"])
@pytest.mark.parametrize("family", SITES)
def test_all_sites_load_in_every_layout(tmp_path, family, layout, depthwise_bias, up_bias):
    variant = {"layout": layout, "depthwise_bias": depthwise_bias, "up_bias": up_bias}
    shapes = published(family, "base_ema:denoiser.", **variant) | frozen(family, "base:denoiser.")
    path = write(tmp_path / "p.safetensors", shapes, lambda number: number % 2048)
    weights = read_weights(path)
    check(weights, family, shapes, "base_ema:denoiser.")
    known, site = FAMILIES[family], next(iter(weights.sites))
    for name, shape in block_shapes(
        known.dims[site],
        known.published_kernel(site),
        depthwise_bias=depthwise_bias,
        up_bias=up_bias,
    ).items():
        assert tuple(weights.state(site)[name].shape) == shape
    weights.block(site)


@pytest.mark.parametrize("family", SITES)
def test_the_whole_frozen_model_beside_the_blocks_is_ignored(tmp_path, family):
    shapes = frozen(family, "unet.") | published(family, "unet.")
    path = write(tmp_path / "p.safetensors", shapes, lambda number: number % 2048)
    check(read_weights(path), family, shapes, "unet.")


def test_a_depthwise_bias_is_part_of_a_block_in_our_own_naming(tmp_path):
    """Of a block that has nothing else that names it, the error says what is missing."""
    shapes = {
        "a.attn.gates.0.conv_spatial.bias": (4,),
        "a.attn.conv_up.weight": (4, 8),
    }
    with pytest.raises(WeightsError, match=r"^a\.attn of x\.safetensors: .*missing: .*conv_out"):
        read_weights(write(tmp_path / "x.safetensors", shapes))


def test_a_partial_ema_set_does_not_win_over_a_complete_one(tmp_path):
    plain, ema = published("sd1", "base:"), published("sd1", "base_ema:")
    partial = dict(list(ema.items())[:21])
    shapes = partial | plain
    path = write(tmp_path / "p.safetensors", shapes, lambda number: number % 2048)
    weights = read_weights(path)
    check(weights, "sd1", shapes, "base:")
    assert "the set base:, because base_ema: lacks" in weights.source
    assert f"{len(ema) - len(partial)} tensors" in weights.source
    # A block cut in half is as partial as one left out.
    shapes = dict(list(ema.items())[:-1]) | plain
    path = write(tmp_path / "p.safetensors", shapes, lambda number: number % 2048)
    assert "base_ema: lacks 1 tensors" in read_weights(path).source


def test_a_complete_ema_set_wins_over_a_partial_one_without_a_word(tmp_path):
    shapes = dict(list(published("sd1", "base:").items())[:21]) | published("sd1", "base_ema:")
    path = write(tmp_path / "p.safetensors", shapes, lambda number: number % 2048)
    weights = read_weights(path)
    check(weights, "sd1", shapes, "base_ema:")
    assert weights.source == "p.safetensors"


def test_two_partial_sets_are_refused_with_what_is_missing(tmp_path):
    plain, ema = (
        list(published("sd1", "base:").items()),
        list(published("sd1", "base_ema:").items()),
    )
    path = write(tmp_path / "p.safetensors", dict(plain[:-7]) | dict(ema[7:]))
    with pytest.raises(WeightsError, match="one complete set") as refused:
        read_weights(path)
    assert "'base_ema:', which lacks 'down_blocks.0" in str(refused.value)
    assert "'base:' lacks 'up_blocks.3" in str(refused.value)


@pytest.mark.parametrize(
    "path",
    [
        "down_blocks.0.motion_modules.0.transformer_blocks.0",
        "input_blocks.1.1.transformer_blocks.0",
        "down_blocks.00.attentions.0.transformer_blocks.0",
        "single_transformer_blocks.3",
    ],
)
def test_published_blocks_at_paths_of_no_model_are_refused_by_load(tmp_path, path):
    shapes = {f"{path}.conv1.{name}": shape for name, shape in block_shapes(320, 3).items()}
    with pytest.raises(WeightsError, match="none of these models has") as refused:
        read_weights(write(tmp_path / "p.safetensors", shapes))
    assert path in str(refused.value)


@pytest.mark.parametrize(
    ("family", "value"),
    [("sd1", "nan"), ("sd1", "inf"), ("sd1", "-inf"), ("pixart", "nan")],
)
def test_values_that_are_not_finite_are_found_on_request(tmp_path, family, value):
    shapes = published(family, "base:")
    last = len(shapes) - 1
    path = write(tmp_path / "p.safetensors", shapes, lambda n: float(value) if n == last else 0)
    site = list(FAMILIES[family].dims)[-1]
    assert site in read_weights(path).sites
    with pytest.raises(WeightsError, match="NaN or infinite values in") as refused:
        read_weights(path, finite=True)
    name = list(shapes)[last].split(".conv1.")[1]
    assert f"{site}: {name} of p.safetensors" in str(refused.value)
    write(path, shapes)
    assert len(read_weights(path, finite=True).sites) == SITES[family]
