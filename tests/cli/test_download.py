"""`deltaconv download`: from the environment as a user sets it, and beside another process."""

import json
import os
import subprocess
import sys
import time

import pytest
from comfyui_deltaconv.cli import CommandError
from comfyui_deltaconv.cli.__main__ import main
from comfyui_deltaconv.deltaconv import demo, hub
from hub_server import COMMIT, hub_of_this_process, sha256
from huggingface_hub import constants

DATA = demo.DELTACONV_PATH.read_bytes()


@pytest.fixture
def folder(tmp_path):
    row = {"repo": "a/b", "revision": COMMIT, "path": "x.safetensors", "sha256": sha256(DATA)}
    (tmp_path / "repositories.json").write_text(json.dumps([row]), encoding="utf-8")
    return tmp_path


def test_two_processes_download_one_file_once(folder, monkeypatch, tmp_path):
    """One reads HF_ENDPOINT and HF_TOKEN itself, in a process of its own; this one comes later."""
    token = "hf_of_the_test"
    with hub_of_this_process(monkeypatch, tmp_path) as server:
        server.files, server.slow = {"a/b": {"x.safetensors": DATA}}, 0.05
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        home = {"HF_HOME": str(folder / "home"), "HF_TOKEN": token}
        line = [sys.executable, "-I", "-m", "comfyui_deltaconv.cli", "download", "x", "--folder"]
        process = subprocess.Popen(
            [*line, str(folder)],
            env={**kept, **home, "HF_ENDPOINT": constants.ENDPOINT, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while not list(folder.glob(".x.*.part")) and process.poll() is None:
                time.sleep(0.02)
            waited = []
            entry = hub.find_entry("x", folder)
            found = hub.download(entry, folder, lambda done, total: waited.append((done, total)))
        finally:
            said = process.communicate(timeout=60)
    assert process.returncode == 0 and said[0].startswith("downloaded 0.7 MB"), said
    assert found.note().startswith("found ") and (0, 0) in waited
    assert found.path.read_bytes() == DATA
    assert [method for method, _, _ in server.seen] == ["HEAD", "GET"]
    assert all(headers["authorization"] == f"Bearer {token}" for _, _, headers in server.seen)
    assert not any(token in text for text in said)
    assert not list(folder.glob(".x*"))


def test_a_refusal_is_a_sentence_and_code_1(folder, monkeypatch, tmp_path, capsys):
    with hub_of_this_process(monkeypatch, tmp_path) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert main(["download", "x", "--folder", str(folder)]) == 1
        said = capsys.readouterr().err
        assert "HF_HUB_OFFLINE" in said and said.count("Expected") == 1 and not server.seen


def test_the_list_names_all_entries_and_asks_nothing(folder, capsys):
    assert main(["download", "--folder", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sd15", "sdxl", "pixart", "x"]
    assert "x.safetensors (a/b)" in lines[-1] and "by hand" not in lines[-1]


def test_names_that_are_not_known_are_refused(folder, capsys):
    assert main(["download", "../y", "--folder", str(folder)]) == 1
    assert "Expected one of sd15, sdxl, pixart, x, got '../y'" in capsys.readouterr().err


def test_without_a_folder_it_is_that_of_comfyui(folder, monkeypatch, capsys):
    from comfyui_deltaconv.cli import download

    (folder / "models" / "deltaconv").mkdir(parents=True)
    (folder / "repositories.json").rename(folder / "models" / "deltaconv" / "repositories.json")
    monkeypatch.setattr(download, "find_comfyui", lambda given: folder)
    assert main(["download"]) == 0
    assert "x.safetensors (a/b)" in capsys.readouterr().out

    def none(given):
        raise CommandError("Expected a ComfyUI")

    monkeypatch.setattr(download, "find_comfyui", none)
    assert main(["download"]) == 1
