"""LPIPS and CLIP score with small stand-ins: a backbone and a CLIP of random weights, so that only
order and plumbing are tested here, and not what the published weights would say of a picture."""

import json
import socket

import pytest
import torch
from comfyui_deltaconv.deltaconv.pictures import perceptual
from comfyui_deltaconv.deltaconv.pictures.perceptual import MetricMissing, clip_scores, lpips

WORDS = ["red", "apple", "blue", "sea", "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and no weights but those that a test puts there."""

    def refuse(*_):
        raise AssertionError("a metric tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(perceptual, "CLIP_MODEL", "nobody/has-this")


@pytest.fixture
def backbone(tmp_path):
    """SqueezeNet with random weights, where torchvision would keep the published ones."""
    import torchvision.models

    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torchvision.models.squeezenet1_1().state_dict()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(state, folder / name)
    return "squeeze"


@pytest.fixture
def clip(tmp_path):
    """A folder with a CLIP of a few thousand random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path / "clip"
    folder.mkdir()
    letters = sorted(set("".join(WORDS[:4])))
    tokens = [*WORDS, *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    size["num_attention_heads"] = 2
    text = {**size, "vocab_size": len(vocabulary), "max_position_embeddings": 12}
    text |= {"bos_token_id": vocabulary[WORDS[4]], "eos_token_id": vocabulary[WORDS[5]]}
    config = CLIPConfig(
        text_config=text,
        vision_config={**size, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def pictures(count=2, size=64):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(2))


def test_lpips_grows_with_the_distance(backbone):
    a = pictures()
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    same, near, far = (
        lpips(a, (a + strength * noise).clamp(0, 1), backbone) for strength in (0.0, 0.05, 0.5)
    )
    assert same == pytest.approx([0, 0], abs=1e-6)
    assert all(0 < n < f for n, f in zip(near, far, strict=True))


def test_lpips_says_how_to_get_its_weights():
    with pytest.raises(MetricMissing, match=r"alexnet-owt.*\.pth.*download https://"):
        lpips(pictures(), pictures())


def test_lpips_says_which_file_is_damaged(backbone, tmp_path):
    (file,) = (tmp_path / "hub" / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MetricMissing, match=f"cannot use .*{file.name}"):
        lpips(pictures(), pictures(), backbone)


def test_lpips_refuses_pictures_below_its_smallest(backbone):
    with pytest.raises(MetricMissing, match="64 pixels or more, got 32 × 32"):
        lpips(pictures(size=32), pictures(size=32), backbone)


def test_clip_scores_follow_picture_and_prompt(clip):
    a = pictures()
    prompts = ["red apple", "blue sea"]
    first, second = clip_scores((a, 1 - a), prompts, clip)
    assert all(0 < score <= 100 for score in first + second)
    assert first != second
    assert first != clip_scores((a,), prompts[::-1], clip)[0]
    alone = clip_scores((a[:1],), prompts[:1], clip)[0]
    assert alone == pytest.approx(first[:1], abs=1e-3)


def test_long_prompts_are_cut_as_clip_reads_them(clip):
    a = pictures(1)
    assert clip_scores((a,), ["red apple " * 40], clip)


def test_clip_score_says_how_to_get_its_weights(tmp_path):
    with pytest.raises(MetricMissing, match=r"nobody/has-this.*snapshot_download"):
        clip_scores((pictures(),), ["red", "blue"], perceptual.CLIP_MODEL)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(MetricMissing, match="cannot use"):
        clip_scores((pictures(),), ["red", "blue"], str(empty))


def test_missing_libraries_are_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = perceptual.perceptual_report(pictures(), pictures(), ["red", "blue"])
    assert report.splitlines() == [
        "- left out, optional: LPIPS needs torchmetrics: pip install torchmetrics",
        "- left out, optional: CLIP score needs transformers: pip install transformers",
    ]


def test_report_has_the_figures_where_all_is_there(backbone, clip, monkeypatch):
    monkeypatch.setattr(perceptual, "LPIPS_BACKBONE", backbone)
    monkeypatch.setattr(perceptual, "CLIP_MODEL", clip)
    a = pictures()
    lines = perceptual.perceptual_report(a, a, ["red apple", "blue sea"]).splitlines()
    assert lines[0] == "- LPIPS (squeeze) 0.0000, 0 is identical"
    before, after = lines[1].removeprefix("- CLIP score ").split(",")[0].split(" → ")
    assert before == after
    assert "needs the prompts" in perceptual.perceptual_report(a, a, None)
