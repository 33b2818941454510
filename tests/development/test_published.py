"""`dev.py published` with the real huggingface_hub against a local server."""

import json
import shutil

import pytest
from comfyui_deltaconv.deltaconv.hub.entries import PUBLISHED, published_entries, unfilled
from comfyui_deltaconv.development import DevelopmentError
from comfyui_deltaconv.development.published import _chosen, fill
from hub_server import COMMIT, hub_of_this_process, sha256

REPO = "7eu7d7/ConvFusion"
FILES = {
    "ConvFusion-SD15-1.safetensors": b"one",
    "ConvFusion-sdxl-1.safetensors": b"two",
    "deep/pixart.safetensors": b"three",
    "sd15.ckpt": b"four",
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_of_this_process(monkeypatch, tmp_path) as found:
        found.files = {REPO: dict(FILES)}
        yield found


@pytest.fixture
def packaged(tmp_path):
    path = tmp_path / "published.json"
    shutil.copy(PUBLISHED, path)
    return path


def test_it_fills_in_all_entries(server, packaged, capsys):
    fill(packaged, {}, "main")
    entries = published_entries(packaged)
    assert [entry.path for entry in entries] == list(FILES)[:3]
    assert [(e.size, e.sha256) for e in entries] == [
        (len(data), sha256(data)) for data in list(FILES.values())[:3]
    ]
    assert {entry.revision for entry in entries} == {COMMIT}
    assert not [problem for entry in entries for problem in unfilled(entry)]
    assert "ConvFusion-SD15-1.safetensors, 3 bytes" in capsys.readouterr().out
    # What is not asked of the hub stays.
    before = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    after = json.loads(packaged.read_text(encoding="utf-8"))
    for old, new in zip(before, after, strict=True):
        assert list(old) == list(new)
        assert all(old[key] == new[key] for key in ("name", "title", "family", "repo"))


def test_several_files_of_one_entry_have_to_be_chosen_among(server, packaged):
    before = packaged.read_bytes()
    server.files[REPO]["sd15-2.safetensors"] = b"five"
    with pytest.raises(DevelopmentError, match=r"sd15, got 2 of .*sd15-2.* --path sd15=PATH"):
        fill(packaged, {}, "main")
    with pytest.raises(DevelopmentError, match="sd15, got 0 of"):
        fill(packaged, {"sd15": "nowhere.safetensors"}, "main")
    with pytest.raises(DevelopmentError, match=r"names of published\.json .* got sd3"):
        fill(packaged, {"sd3": "x"}, "main")
    assert packaged.read_bytes() == before
    fill(packaged, _chosen(["sd15=sd15-2.safetensors"]), "main")
    assert published_entries(packaged)[0].sha256 == sha256(b"five")


def test_what_cannot_be_used_is_not_written(server, packaged):
    before = packaged.read_bytes()
    server.large = False
    with pytest.raises(DevelopmentError, match="expected sha256 of sd15, got none"):
        fill(packaged, {}, "main")
    server.files.clear()
    with pytest.raises(DevelopmentError, match=f"Expected the hub to list {REPO} at main"):
        fill(packaged, {}, "main")
    with pytest.raises(DevelopmentError, match="NAME=PATH"):
        _chosen(["x"])
    assert packaged.read_bytes() == before and len(list(packaged.parent.iterdir())) == 1
