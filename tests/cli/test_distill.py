"""`deltaconv distill`: a whole run on the packaged demo, at a small size, from a folder."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from comfyui_deltaconv.cli import CommandError, distill
from comfyui_deltaconv.cli.distill import distill_as
from comfyui_deltaconv.cli.distill_config import Configuration, chosen_settings, read_configuration
from comfyui_deltaconv.cli.distill_inputs import read_pictures
from comfyui_deltaconv.deltaconv import demo, read_weights, write_weights
from comfyui_deltaconv.deltaconv.distillation import PRESETS, code_settings, paper_settings

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture
def pictures(tmp_path):
    from comfyui_deltaconv.deltaconv.pictures.metrics import to_pil

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
        "recipe": {"middle_block.1.transformer_blocks.0.attn1": [3, [1.0], 4]},
        "settings": {
            "init_images": 4,
            "layers": {"steps": 2, "batch": 2},
            "joint": {"steps": 0},
        },
        "folder": str(tmp_path / "out"),
    }
    distill_as(Configuration(**config))
    weights = read_weights(tmp_path / "out" / "deltaconv.safetensors")
    assert list(weights.sites) == list(config["recipe"])
    assert [geometry.heads for geometry in weights.sites.values()] == [4]
    assert "demo" in weights.base_model
    config["settings"]["layers"]["steps"] = 4
    distill_as(Configuration(**config))
    lines = (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [(line["stage"], line["step"]) for line in map(json.loads, lines)]
    assert steps == [("init", 1), *(("layers", step) for step in (1, 2, 3, 4))]
    assert "resumed after 2 steps" in lines[3]
    assert "Weights:" in capsys.readouterr().out


def test_packaged_weights_are_gone_on_from(tmp_path, pictures, capsys):
    config = {
        "data": str(pictures),
        "size": 16,
        "start": "packaged",
        "gate": "sigmoid",
        "settings": {"layers": {"steps": 0}, "joint": {"steps": 1, "batch": 1, "lr": 1e-12}},
        "folder": str(tmp_path / "out"),
    }
    distill_as(Configuration(**config))
    assert "init        1/1  loss 0.00000" in capsys.readouterr().out
    packaged, found = (
        read_weights(path)
        for path in (demo.DELTACONV_PATH, tmp_path / "out" / "deltaconv.safetensors")
    )
    assert found.sites == packaged.sites and found.gate == packaged.gate == "scaled"
    for site in packaged.sites:
        for name, tensor in packaged.block(site).state_dict().items():
            got = found.block(site).state_dict()[name]
            assert (got - tensor).abs().max() <= 1e-3 * tensor.abs().max(), (site, name)
    site = "middle_block.1.transformer_blocks.0.attn1"
    config |= {"recipe": {site: packaged.sites[site].kernel_size}, "folder": str(tmp_path / "one")}
    distill_as(Configuration(**config))
    assert list(read_weights(tmp_path / "one" / "deltaconv.safetensors").sites) == [site]


def test_weights_gone_on_from_keep_where_they_act(tmp_path, pictures):
    packaged = read_weights(demo.DELTACONV_PATH)
    late = packaged.only(list(packaged.sites)[:1], 0.4)
    path = write_weights(late, tmp_path / "late.safetensors")
    settings = {"layers": {"steps": 1, "batch": 1}, "joint": {"steps": 0}}
    for name, more, expected in (("kept", {}, 0.4), ("said", {"start": 0.2}, 0.2)):
        folder = tmp_path / name
        config = {"data": str(pictures), "size": 16, "start": str(path), "folder": str(folder)}
        distill_as(Configuration(**config, settings=settings | more))
        found = read_weights(folder / "deltaconv.safetensors")
        assert (found.start, found.sites) == (expected, late.sites)


def test_weights_that_cannot_be_gone_on_from_are_refused(tmp_path, pictures):
    config = {"data": str(pictures), "size": 16, "folder": str(tmp_path / "out")}
    for start in (tmp_path / "none.safetensors", demo.TEACHER_PATH):
        with pytest.raises(CommandError, match=start.name):
            distill_as(Configuration(**config, start=str(start)))
    assert not (tmp_path / "out").exists()


def test_minutes_plan_the_steps_and_a_choice_says_which_layers(tmp_path, monkeypatch, capsys):
    from comfyui_deltaconv.deltaconv.distillation.choice import SiteCost
    from comfyui_deltaconv.nodes.host import distill_choice

    def costs(model, weights, size, batch):
        """Those of a device on which one layer is most of the time."""
        first, *others = weights.sites
        found = {first: SiteCost(10.0, 1.0), **dict.fromkeys(others, SiteCost(1.0, 0.9))}
        return found, "as a test says"

    monkeypatch.setattr(distill_choice, "site_costs", costs)
    monkeypatch.setattr(distill_choice, "_STEPS", 4)
    monkeypatch.setattr(distill_choice, "_PROMPTS", 1)
    monkeypatch.chdir(tmp_path)
    settings = {"init": "random", "layers": {"batch": 2}, "joint": {"batch": 2}}
    distill_as(
        Configuration(
            prompts=["octopus", "red apple"],
            samples=4,
            size=16,
            minutes=0.1,
            kernels="5 and pooled tokens",
            settings=settings,
        )
    )
    said = capsys.readouterr().out
    assert "balanced: blocks in " in said and "as a test says" in said
    assert "layer and " in said and "joint steps in all" in said
    weights = read_weights(tmp_path / "output" / "distill" / "deltaconv.safetensors")
    assert len(weights.sites) < 10 or weights.start > 0
    assert weights.training["settings"]["growth"] == 10
    assert all(geometry.heads == geometry.dim // 32 for geometry in weights.sites.values())


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, pictures, monkeypatch, capsys):
    entries = {"data": str(pictures), "size": 16, "folder": str(tmp_path / "out")}
    entries["recipe"] = {"middle_block.1.transformer_blocks.0.attn1": 3}
    stages = {"layers": {"steps": 4, "batch": 2}, "joint": {"steps": 0}}
    entries["settings"] = {"init": "random", **stages}

    def interrupted(record, seconds):
        if record.stage == "layers":
            raise KeyboardInterrupt
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(distill, "line_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill_as(Configuration(**entries))
    distill_as(Configuration(**entries))
    assert "resumed after 1 step" in capsys.readouterr().out
    assert read_weights(tmp_path / "out" / "deltaconv.safetensors").training["steps"] == 4


def test_pictures_are_what_the_sheet_says():
    found, captions = demo.pictures()
    assert found.shape == (512, 3, 64, 64) and len(captions) == 512
    assert found.min() >= -1 and found.max() <= 1
    circle = found[captions.index("large red circle")]
    red = circle[0] > circle[1] + 0.5
    assert 0.3 < red.float().mean() < 0.9


def test_pictures_come_with_their_captions(pictures):
    (pictures / "2.txt").unlink()
    found, captions = read_pictures(Configuration(data=str(pictures)), [(8, 8)])
    assert [tuple(picture.shape) for picture in found] == [(8, 8, 3)] * 3
    assert captions[:2] == demo.pictures()[1][:2] and captions[2] == ""
    assert all(0 <= picture.min() and picture.max() <= 1 for picture in found)


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_folders_without_usable_pictures_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(CommandError, match="Expected pictures" if content is None else "a.png"):
        read_pictures(Configuration(data=str(tmp_path)), [(8, 8)])


def test_configuration_problems_are_listed_together(tmp_path):
    path = tmp_path / "x.yaml"
    wrong = "model: 3\nsize: true\npreset: best\nmore: 1\nminutes: 0\nchoice: most\n"
    path.write_text(wrong, encoding="utf-8")
    with pytest.raises(CommandError) as error:
        read_configuration(path)
    for word in ("model", "size", "preset", "more", "minutes", "choice"):
        assert word in str(error.value)


def test_a_configuration_names_its_preset(tmp_path):
    path = tmp_path / "x.yaml"
    for name, preset in PRESETS.items():
        path.write_text(f"preset: {name}\nsettings: {{joint: {{steps: 7}}}}\n", encoding="utf-8")
        found = chosen_settings(read_configuration(path))
        wanted = preset()
        assert found.joint.steps == 7 and found.losses == wanted.losses
        assert found.joint.weight_decay == wanted.joint.weight_decay
        assert found.joint.decayed == wanted.joint.decayed and found.eight_bit == wanted.eight_bit


def test_the_nodes_losses_are_presets():
    from comfyui_deltaconv.nodes.host.distill_inputs import DistillInputs
    from comfyui_deltaconv.nodes.host.distill_options import LOSSES, DistillOptions

    for name, preset in LOSSES.items():
        options = DistillOptions(losses=name, eight_bit=True, joint_steps=3, joint_rate=2e-3)
        found = DistillInputs(options).settings()
        assert found.losses == PRESETS[preset]().losses and found.eight_bit
        assert found.joint.steps == 3 and found.joint.lr == 2e-3
    assert set(LOSSES.values()) <= set(PRESETS) and list(LOSSES)[:2] == ["ours", "published"]
    assert PRESETS[LOSSES["published"]]().losses == paper_settings().losses
    (code,) = (name for name in LOSSES if "authors' code" in name)
    assert PRESETS[LOSSES[code]]().losses == code_settings("SD1.5").losses


def test_packaged_pictures_do_not_change():
    found, captions = demo.pictures()
    digest = hashlib.sha256(((found + 1) * 127.5).round().to(torch.uint8).numpy().tobytes())
    digest.update("\n".join(captions).encode())
    assert digest.hexdigest()[:16] == "78c9282dd30ba772"


@pytest.mark.parametrize("content", [None, b"", b"\x80\x02}q\x00.", b"not a checkpoint"])
def test_checkpoints_that_do_not_load_are_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CommandError, match=r"model\.safetensors"):
        distill_as(Configuration(model=str(path), folder=str(tmp_path / "out")))


@pytest.mark.parametrize("entry", ["size: 0", "size: -4", "samples: 0"])
def test_sizes_that_cannot_be_are_refused(tmp_path, entry):
    path = tmp_path / "x.yaml"
    path.write_text(entry, encoding="utf-8")
    with pytest.raises(CommandError, match=entry.split(":", 1)[0]):
        read_configuration(path)


@pytest.mark.any_comfyui
def test_module_is_the_command(comfyui_tree, tmp_path):
    """As a user starts it, from prompts alone."""
    config = tmp_path / "x.yaml"
    entries = {
        "prompts": ["octopus"],
        "samples": 1,
        "size": 16,
        "recipe": {"middle_block.1.transformer_blocks.0.attn1": 3},
        "settings": {
            "init": "random",
            "layers": {"steps": 2, "batch": 1},
            "joint": {"steps": 0},
        },
        "folder": str(tmp_path / "out"),
    }
    config.write_text(json.dumps(entries), encoding="utf-8")
    command = [sys.executable, "-m", "comfyui_deltaconv.cli", "distil", "--config", str(config)]
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "own samples: 100%" in done.stdout and "Weights:" in done.stdout
    weights = read_weights(tmp_path / "out" / "deltaconv.safetensors")
    assert weights.training["steps"] == 2
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 3
