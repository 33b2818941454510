"""`python dev.py distil`: a whole run on the packaged demo, at a small size, from a folder."""

import json

import pytest
import torch
from comfyui_deltaconv.deltaconv import demo, read_weights
from comfyui_deltaconv.development import DevelopmentError
from comfyui_deltaconv.development.distil import read_config, read_folder, run

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture
def pictures(tmp_path):
    from comfyui_deltaconv.deltaconv.compare import to_pil

    folder = tmp_path / "pictures"
    folder.mkdir()
    found, captions = demo.pictures()
    for index in range(3):
        to_pil((found[index].movedim(0, -1) + 1) / 2).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(captions[index], encoding="utf-8")
    return folder


def test_a_folder_of_pictures_is_distilled_resumed_and_logged(tmp_path, pictures, capsys):
    config = {
        "data": str(pictures),
        "size": 16,
        "recipe": {"middle_block.1.transformer_blocks.0.attn1": [3, [1.0]]},
        "settings": {
            "init_images": 4,
            "layers": {"steps": 2, "batch": 2},
            "joint": {"steps": 0},
        },
        "folder": str(tmp_path / "out"),
    }
    run(config)
    weights = read_weights(tmp_path / "out" / "deltaconv.safetensors")
    assert list(weights.sites) == list(config["recipe"])
    assert "demo" in weights.base_model
    config["settings"]["layers"]["steps"] = 4
    run(config)
    lines = (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [(line["stage"], line["step"]) for line in map(json.loads, lines)]
    assert steps == [("init", 1), *(("layers", step) for step in (1, 2, 3, 4))]
    assert "resumed after 2 steps" in lines[3]
    assert "Weights:" in capsys.readouterr().out


def test_pictures_are_what_the_sheet_says():
    found, captions = demo.pictures()
    assert found.shape == (512, 3, 64, 64) and len(captions) == 512
    assert found.min() >= -1 and found.max() <= 1
    circle = found[captions.index("large red circle")]
    red = circle[0] > circle[1] + 0.5
    assert 0.3 < red.float().mean() < 0.9


def test_pictures_come_with_their_captions(pictures):
    (pictures / "2.txt").unlink()
    found, captions = read_folder(pictures, 8)
    assert [tuple(picture.shape) for picture in found] == [(8, 8, 3)] * 3
    assert captions[:2] == demo.pictures()[1][:2] and captions[2] == ""
    assert all(0 <= picture.min() and picture.max() <= 1 for picture in found)


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_folders_without_usable_pictures_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DevelopmentError, match="Expected pictures" if content is None else "a.png"):
        read_folder(tmp_path, 8)


def test_configuration_problems_are_listed_together(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: 3\nsize: true\npreset: best\nmore: 1\n", encoding="utf-8")
    with pytest.raises(DevelopmentError) as error:
        read_config(path)
    for word in ("model", "size", "preset", "more"):
        assert word in str(error.value)


def test_packaged_pictures_do_not_change():
    found, _ = demo.pictures()
    assert torch.equal(found[0, :, 0, 0], torch.ones(3))
