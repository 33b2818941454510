"""`deltaconv precompute`: pictures to a store, shared by processes, gone on with, trained on."""

import json

import pytest
import torch
import yaml
from comfyui_deltaconv.cli import CommandError, precompute
from comfyui_deltaconv.cli.distill import distill_as
from comfyui_deltaconv.cli.distill_config import Configuration
from comfyui_deltaconv.cli.distill_inputs import chosen_inputs, load_teacher
from comfyui_deltaconv.cli.precompute import precompute_as
from comfyui_deltaconv.deltaconv import demo, read_weights
from comfyui_deltaconv.deltaconv.distillation import DistillationSettings
from comfyui_deltaconv.deltaconv.scale import board, sources
from launched import finished, launched
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SITE = "middle_block.1.transformer_blocks.0.attn1"


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures, every other one wide, and one that is broken."""
    from comfyui_deltaconv.deltaconv.pictures.metrics import to_pil

    folder = tmp_path / "pictures"
    folder.mkdir()
    found, captions = demo.pictures()
    for index in range(10):
        picture = to_pil((found[index].movedim(0, -1) + 1) / 2)
        if index % 2:
            picture = picture.resize((96, 48))
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(captions[index], encoding="utf-8")
    (folder / "5.png").write_bytes((folder / "4.png").read_bytes()[:200])
    return folder


def configuration(tmp_path, pictures, **changes):
    entries = {
        "data": str(pictures),
        "size": 32,
        "buckets": True,
        "corrupt": 0.2,
        "recipe": {SITE: 3},
        "settings": {
            "init_images": 4,
            "layers": {"steps": 3, "batch": 2},
            "joint": {"steps": 0},
        },
        "folder": str(tmp_path / "out"),
    }
    return {**entries, **changes}


def losses(folder):
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_store_is_made_in_parts_and_holds_what_its_pictures_are(
    comfy, tmp_path, pictures, monkeypatch, capsys
):
    monkeypatch.setattr(sources, "_FILES_OF_A_PART", 3)
    monkeypatch.setattr(board, "_STEPS", 2)
    store = tmp_path / "store"
    config = configuration(tmp_path, pictures, store=str(store))
    # Two processes, one of which was stopped before its second part.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    precompute_as(Configuration(**config))
    assert "part 2 of 4: 2 items" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(CommandError, match="number 0 is missing"):
        distill_as(Configuration(**config))
    before = (store / "part-000001.arrow").stat().st_mtime_ns
    precompute_as(Configuration(**config))
    said = capsys.readouterr().out
    assert "part 1 of 4: 3 items" in said and "part 2 of 4" not in said
    assert (store / "part-000001.arrow").stat().st_mtime_ns == before
    distill_as(Configuration(**config, tensorboard=True, pictures_every=10))
    assert "1 of 10 items were skipped" in capsys.readouterr().out
    assert len(losses(tmp_path / "out")) == 4
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3]
    assert [event.value for event in events.Scalars(f"layers/{SITE}")] == pytest.approx(
        losses(tmp_path / "out")[1:]
    )
    assert {"lr", "images_per_second", "memory_gib"} <= set(events.Tags()["scalars"])
    # At the end at least.
    for name in ("student", "teacher"):
        assert [event.step for event in events.Images(f"pictures/{name}")] == [3]
    teacher = load_teacher(Configuration(), DistillationSettings())
    kept = chosen_inputs(Configuration(**config), teacher).data
    read = chosen_inputs(Configuration(**{**config, "store": None}), teacher).data
    assert "5.png" in capsys.readouterr().out
    assert len(kept) == len(read.latents) == 9
    assert {tuple(latent.shape[1:]) for latent in kept.latents} == {(32, 32), (24, 40)}
    for found, latent in zip(kept.latents, read.latents, strict=True):
        assert torch.equal(found, latent.half().float())
    pairs = [*zip(kept.conditions, read.conditions, strict=True)]
    for found, entry in [*pairs, (kept.unconditional, read.unconditional)]:
        assert torch.equal(found[0], entry[0].half().float()) and found[1] == entry[1]
    read_weights(tmp_path / "out" / "deltaconv.safetensors")
    with pytest.raises(CommandError, match="store of this sizes"):
        precompute_as(Configuration(**{**config, "buckets": False}))


def test_more_corrupt_pictures_than_stated_are_refused(comfy, tmp_path, pictures):
    config = configuration(tmp_path, pictures, store=str(tmp_path / "store"), corrupt=0.05)
    with pytest.raises(CommandError, match=r"5\.00%.* 1 of 10.*5\.png"):
        precompute_as(Configuration(**config))


@pytest.mark.parametrize(
    ("entries", "said"), [({"data": "pictures"}, "entry store"), ({"store": "s"}, "pictures to")]
)
def test_configurations_without_data_or_store_are_refused(tmp_path, entries, said):
    import argparse

    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(entries), encoding="utf-8")
    with pytest.raises(CommandError, match=said):
        precompute.run(argparse.Namespace(config=path, comfyui=None))


@pytest.mark.long
@pytest.mark.any_comfyui
def test_two_processes_share_the_parts_and_train_on_the_store(comfyui_tree, tmp_path, pictures):
    """As torchrun starts both commands, with one configuration file."""
    config = configuration(tmp_path, pictures, store="store", workers=1, recipe={})
    config |= {"choice": "fastest", "folder": "out"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    env = {"COMFYUI_PATH": str(comfyui_tree)}
    for command in ("precompute", "distill"):
        line = ("-m", "comfyui_deltaconv.cli", command, "--config", "x.yaml")
        finished(launched(2, *line, cwd=tmp_path, env=env))
    assert len(losses(tmp_path / "out")) == 4
