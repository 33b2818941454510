"""The server harness: what it says when ComfyUI does not come up, and that it leaves nothing."""

import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from comfyui_deltaconv.development import ROOT, DevelopmentError
from comfyui_deltaconv.development.comfyui.client import PromptFailed, PromptRefused
from comfyui_deltaconv.development.comfyui.server import _link, running
from comfyui_deltaconv.development.demo import Graph


def processes_with(text):
    """Processes of this machine whose command line holds `text`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(text in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def test_loads_the_pack_without_a_warning(server):
    about_us = [line for line in server.said().splitlines() if "deltaconv" in line.lower()]
    assert about_us and not [line for line in about_us if "WARN" in line or "FAILED" in line]


def test_invalid_prompt_is_refused_by_name(server):
    prompt = {"1": {"class_type": "DeltaConvDemoPrompt", "inputs": {}}}
    with pytest.raises(PromptRefused, match="no outputs"):
        server.queue(prompt)
    prompt["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    with pytest.raises(PromptRefused, match=r"PreviewImage \(2\)"):
        server.queue(prompt)


def test_interrupt_stops_a_run_and_the_next_one_works(server):
    graph = Graph.read(server.object_info())
    endless = graph.with_inputs("red apple", steps=5000, seed=2)
    sampling = threading.Event()

    def interrupt():
        assert sampling.wait(60)
        server.interrupt()

    def watch(event, detail):
        if event == "progress":
            sampling.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(PromptFailed) as stopped:
        server.queue(endless, on_event=watch)
    thread.join()
    assert stopped.value.event == "execution_interrupted"
    assert server.queue(graph.with_inputs("red apple", steps=1))["status"]["completed"]


def test_a_taken_port_is_a_sentence(comfyui_tree):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(DevelopmentError, match=rf"Port {port} is taken .* --port"),
            running(comfyui_tree, port=port),
        ):
            pass


def test_a_server_that_dies_at_boot_shows_its_log(comfyui_tree, tmp_path):
    with (
        pytest.raises(DevelopmentError, match="ended while it started") as died,
        running(comfyui_tree, base=tmp_path, arguments=["--no-such-option"]),
    ):
        pass
    assert "unrecognized arguments: --no-such-option" in str(died.value)


@pytest.mark.any_comfyui
def test_a_pack_that_fails_to_import_is_an_error(comfyui_tree, tmp_path):
    broken = tmp_path / "custom_nodes" / "deltaconv"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    with (
        pytest.raises(DevelopmentError, match="could not load this pack") as failed,
        running(comfyui_tree, base=tmp_path),
    ):
        pass
    assert "broken on purpose" in str(failed.value)
    assert processes_with(str(tmp_path)) == []


@pytest.mark.any_comfyui
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to send to one process")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_leaves_nothing_behind(comfyui_tree, tmp_path, monkeypatch, stop):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui_tree))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-I", "-m", "comfyui_deltaconv.development", "serve"]
    line += ["--port", str(port), "--base", str(tmp_path)]
    # A shell starts what runs behind it with SIGINT ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    serve = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    signal.signal(signal.SIGINT, before)
    try:
        said = [serve.stdout.readline(), serve.stdout.readline()]
        assert f"http://127.0.0.1:{port}" in said[-1], said
        assert len(processes_with(str(tmp_path))) == 2
    finally:
        serve.send_signal(stop)
        serve.communicate(timeout=300)
    deadline = time.monotonic() + 60
    while processes_with(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(str(tmp_path)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="links are made another way on Windows")
def test_a_link_to_a_moved_clone_is_mended_and_a_real_pack_stays(tmp_path):
    link = tmp_path / "deltaconv"
    link.symlink_to(tmp_path / "moved away")
    _link(ROOT, link)
    assert link.resolve() == ROOT
    real = tmp_path / "real"
    real.mkdir()
    _link(ROOT, real)
    assert not real.is_symlink() and list(real.iterdir()) == []
