"""The nodes as ComfyUI calls them, on real folders and real pictures."""

import math

import pytest
import torch
from comfyui_deltaconv.deltaconv import demo, read_weights
from comfyui_deltaconv.deltaconv.pictures.metrics import compare, side_by_side

pytestmark = pytest.mark.usefixtures("comfy")


def test_folders_come_behind_those_that_were_named(folders):
    import folder_paths

    paths, extensions = folder_paths.folder_names_and_paths["deltaconv"]
    expected = ("extra", "models/deltaconv", "output/deltaconv")
    assert [str(folders / part) for part in expected] == paths
    assert extensions == {".safetensors"}


def test_the_folder_for_downloads_is_made(folders):
    assert (folders / "models" / "deltaconv").is_dir()


def test_an_installation_that_cannot_be_written_loads_all_the_same(folders, monkeypatch, caplog):
    import folder_paths
    from comfyui_deltaconv.nodes.host.folders import register_folders

    blocked = folders / "blocked"
    blocked.write_bytes(b"a file where the folder should be")
    monkeypatch.setattr(folder_paths, "models_dir", str(blocked))
    register_folders()
    assert str(blocked / "deltaconv") in caplog.text and "going on without it" in caplog.text
    assert str(blocked / "deltaconv") in folder_paths.folder_names_and_paths["deltaconv"][0]


def test_an_empty_list_says_where_files_belong_until_there_is_one(folders):
    from comfyui_deltaconv.nodes.load_save import DeltaConvLoad

    def options():
        (file,) = DeltaConvLoad.define_schema().inputs
        return file.options

    assert options() == ["none: put one into models/deltaconv"]
    sentence = DeltaConvLoad.validate_inputs(*options())
    assert "got no choice of one" in sentence and "7eu7d7/ConvFusion" in sentence
    path = folders / "models" / "deltaconv" / "a.safetensors"
    path.write_bytes(demo.DELTACONV_PATH.read_bytes())
    assert options() == ["a.safetensors"]


def test_a_file_name_that_is_linked_is_validated_when_it_is_known(folders):
    from comfyui_deltaconv.nodes.load_save import DeltaConvLoad

    assert DeltaConvLoad.validate_inputs(None) is True


def test_load_refuses_values_that_are_not_finite(folders):
    from comfyui_deltaconv.nodes.load_save import DeltaConvLoad
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = folders / "models" / "deltaconv" / "broken.safetensors"
    tensors = load_file(demo.DELTACONV_PATH)
    with safe_open(demo.DELTACONV_PATH, "pt") as file:
        metadata = file.metadata()
    key = list(tensors)[-1]
    tensors[key].view(-1)[-1] = math.nan
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="NaN or infinite values in") as refused:
        DeltaConvLoad.execute("broken.safetensors")
    assert key.rpartition("attn1.")[2] in str(refused.value)


def test_files_of_all_folders_are_offered_and_others_are_not(folders):
    from comfyui_deltaconv.nodes.host.folders import list_files

    for folder, name in (
        ("extra", "a.safetensors"),
        ("models/deltaconv/sub", "b.safetensors"),
        ("output/deltaconv", "c.safetensors"),
        ("models/deltaconv", "d.ckpt"),
    ):
        (folders / folder).mkdir(parents=True, exist_ok=True)
        (folders / folder / name).write_bytes(demo.DELTACONV_PATH.read_bytes())
    names = {name.replace("\\", "/") for name in list_files()}
    assert names == {"a.safetensors", "sub/b.safetensors", "c.safetensors"}
    from comfyui_deltaconv.nodes.load_save import DeltaConvLoad

    for name in names:
        assert DeltaConvLoad.validate_inputs(name) is True
        (weights,) = DeltaConvLoad.execute(name).args
        assert len(weights.sites) == 10


@pytest.mark.parametrize("name", ["none.safetensors", "../secret.safetensors", ""])
def test_files_that_are_not_there_are_refused_with_the_folder(folders, name):
    from comfyui_deltaconv.nodes.load_save import DeltaConvLoad

    (folders / "secret.safetensors").write_bytes(demo.DELTACONV_PATH.read_bytes())
    sentence = DeltaConvLoad.validate_inputs(name)
    assert str(folders / "models") in sentence and "Put the .safetensors file there" in sentence


def test_save_numbers_its_files_and_load_finds_them(folders):
    from comfyui_deltaconv.nodes.load_save import DeltaConvLoad, DeltaConvSave

    weights = read_weights(demo.DELTACONV_PATH)
    names = [DeltaConvSave.execute(weights, "mine").args[0] for _ in range(3)]
    assert names == [f"mine_0000{i}_.safetensors" for i in (1, 2, 3)]
    names.append(DeltaConvSave.execute(weights, "sub/mine").args[0])
    for name in names:
        (loaded,) = DeltaConvLoad.execute(name).args
        assert loaded.sites == weights.sites
    before = DeltaConvLoad.fingerprint_inputs(names[0])
    path = folders / "output" / "deltaconv" / names[0]
    path.write_bytes(path.read_bytes() + b"")
    assert DeltaConvLoad.fingerprint_inputs(names[0]) != before


@pytest.mark.parametrize("prefix", ["../escape", "/tmp/escape", "a/../../../escape"])
def test_save_stays_in_its_folder(folders, prefix):
    from comfyui_deltaconv.nodes.load_save import DeltaConvSave

    with pytest.raises(Exception, match="outside the output folder"):
        DeltaConvSave.execute(read_weights(demo.DELTACONV_PATH), prefix)
    assert not list(folders.rglob("*escape*"))


def test_demo_prompt_reports_unknown_words():
    from comfyui_deltaconv.nodes.demo import DeltaConvDemoPrompt

    conditioning, report = DeltaConvDemoPrompt.execute("Red  APPLE").args
    assert conditioning[0][0].shape == (1, 12, 64)
    assert report == "All 2 words are known to the demo model."
    _, report = DeltaConvDemoPrompt.execute("red zebrafish apple zebrafish").args
    assert "ignored: zebrafish." in report
    _, report = DeltaConvDemoPrompt.execute("red " * 12 + "apple").args
    assert "reads 12 words; ignored: apple" in report
    empty, report = DeltaConvDemoPrompt.execute("").args
    assert "without guidance" in report
    unknown, _ = DeltaConvDemoPrompt.execute("zebrafish").args
    assert torch.equal(empty[0][0], unknown[0][0])


def test_demo_contexts_are_the_golden_ones(data):
    from safetensors.torch import load_file

    golden = load_file(data / "demo_forward.safetensors")
    encoder = demo.text_encoder()
    context = torch.cat([encoder.encode("red apple"), encoder.encode("cat face")])
    assert torch.equal(context, golden["context"])


def pictures(count=2, height=20, width=30, channels=3):
    torch.manual_seed(0)
    return torch.rand(count, height, width, channels)


def test_comparison_by_closed_forms():
    a = pictures()
    same = compare(a, a)
    assert same.psnr == [math.inf, math.inf] and same.ssim == pytest.approx([1, 1])
    assert "inf (identical)" in same.report()
    shifted = compare(torch.zeros(1, 20, 30, 3), torch.full((1, 20, 30, 3), 0.1))
    assert shifted.psnr == pytest.approx([20.0], abs=1e-4)


def test_ssim_falls_with_noise_and_psnr_with_it():
    a = pictures(1, 64, 64)
    results = [compare(a, (a + s * torch.randn_like(a)).clamp(0, 1)) for s in (0.05, 0.2)]
    assert results[0].mean_psnr > results[1].mean_psnr
    assert results[0].mean_ssim > results[1].mean_ssim


def test_alpha_and_single_pictures_are_taken():
    a = pictures(channels=4)
    result = compare(a, a[:1, :, :, :3])
    assert math.isinf(result.psnr[0]) and not math.isinf(result.psnr[1])


@pytest.mark.parametrize("other", [(2, 20, 31, 3), (3, 20, 30, 3)])
def test_batches_that_do_not_match_are_refused(other):
    with pytest.raises(ValueError, match="2 of 30 × 20"):
        compare(pictures(), torch.zeros(other))


def test_side_by_side_keeps_every_pixel():
    a, b = pictures(1, 8, 16), pictures(1, 8, 16).flip(1)
    sheet = side_by_side(a, b, "left", "right", ["caption"])
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3
    eight_bit = (a[0] * 255).round() / 255
    enlarged = eight_bit.repeat_interleave(16, 0).repeat_interleave(16, 1)
    rows = [
        top
        for top in range(sheet.shape[1] - 128)
        if torch.allclose(sheet[0, top, 16:272], enlarged[0], atol=1e-6)
    ]
    assert torch.allclose(sheet[0, rows[0] : rows[0] + 128, 16:272], enlarged, atol=1e-6)


def test_without_kornia_the_text_says_so(monkeypatch):
    import sys

    from comfyui_deltaconv.nodes.compare import DeltaConvCompare

    monkeypatch.setitem(sys.modules, "kornia.metrics", None)
    _, report, psnr, ssim = DeltaConvCompare.execute(pictures(), pictures(), "a", "b").args
    assert "pip install kornia" in report
    assert math.isinf(psnr) and math.isnan(ssim)


def test_every_node_has_a_help_page(folders):
    import asyncio

    import comfyui_deltaconv
    from comfyui_deltaconv.development import ROOT

    extension = asyncio.run(comfyui_deltaconv.comfy_entrypoint())
    for node in asyncio.run(extension.get_node_list()):
        schema = node.GET_SCHEMA()
        assert schema.node_id.startswith("DeltaConv") and schema.node_id.isascii()
        assert schema.category == "ΔConv"
        assert schema.description
        page = ROOT / "web" / "docs" / f"{schema.node_id}.md"
        text = page.read_text(encoding="utf-8")
        assert text.startswith("# "), page
        # The panel is too narrow for a table.
        assert "|---" not in text, page


# Where everything stands that the others leave out.
MANY_INPUTS = {"DeltaConvDistillSettings"}


def test_inputs_are_few_and_each_is_explained(folders):
    import asyncio

    import comfyui_deltaconv

    extension = asyncio.run(comfyui_deltaconv.comfy_entrypoint())
    for node in asyncio.run(extension.get_node_list()):
        schema = node.GET_SCHEMA()
        unexplained = [entry.id for entry in schema.inputs if not entry.tooltip]
        assert not unexplained, schema.node_id
        at_first = [entry.id for entry in schema.inputs if not getattr(entry, "advanced", None)]
        assert len(at_first) <= 8 or schema.node_id in MANY_INPUTS, (schema.node_id, at_first)
