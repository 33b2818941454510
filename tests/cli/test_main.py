"""`deltaconv`: its commands, its errors, and which ComfyUI it takes."""

import os
import signal
import subprocess
import sys

import pytest
from comfyui_deltaconv.cli import CommandError, bench, device, host, selftest
from comfyui_deltaconv.cli.__main__ import ALIASES, COMMANDS, main
from comfyui_deltaconv.development import ROOT


def make_comfyui(folder):
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "model_patcher.py").touch()
    (folder / "main.py").touch()
    return folder


@pytest.mark.parametrize("name", [*COMMANDS, *ALIASES["distill"]])
def test_every_command_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and f"deltaconv {name}" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = "import sys, comfyui_deltaconv.cli.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_an_error_is_one_sentence_and_code_1(monkeypatch, capsys):
    def refuse(options):
        raise CommandError("Expected this, got that.")

    monkeypatch.setattr(selftest, "run", refuse)
    assert main(["selftest"]) == 1
    assert capsys.readouterr().err == "\nExpected this, got that.\n"


def test_another_python_than_comfyuis_is_told_so(tmp_path):
    # Without its site-packages it has the standard library alone.
    (tmp_path / "deltaconv").symlink_to(ROOT)
    line = [sys.executable, "-S", "-m", "deltaconv.cli", "selftest"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "has no module torch" in done.stderr and sys.executable in done.stderr


def test_a_module_of_the_pack_that_is_missing_is_no_other_python(monkeypatch):
    def broken(options):
        raise ModuleNotFoundError("gone", name="comfyui_deltaconv.cli.gone")

    monkeypatch.setattr(bench, "run", broken)
    with pytest.raises(ModuleNotFoundError, match="gone"):
        main(["bench"])


def test_ctrl_c_is_code_130(monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", lambda options: signal.raise_signal(signal.SIGINT))
    # A process that a shell started in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["bench"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Stopped." in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused():
    assert str(device.chosen_device("cpu")) == "cpu"
    with pytest.raises(CommandError, match=r"Expected --device to be one .* got 'no such'"):
        device.chosen_device("no such")


def test_comfyui_is_found_in_the_order_that_is_promised(tmp_path, monkeypatch):
    given, named, holding, importable = (make_comfyui(tmp_path / name) for name in "abcd")
    pack = holding / "custom_nodes" / "a-pack"
    monkeypatch.setattr(host, "__file__", str(pack / "cli" / "host.py"))
    monkeypatch.syspath_prepend(importable)
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    # In a process that has ComfyUI already, that one would be found.
    monkeypatch.delitem(sys.modules, "comfy", raising=False)
    assert host.find_comfyui(given) == given
    assert host.find_comfyui() == named
    monkeypatch.delenv("COMFYUI_PATH")
    assert host.find_comfyui() == holding
    monkeypatch.setattr(host, "__file__", str(tmp_path / "elsewhere" / "pack" / "cli" / "host.py"))
    assert host.find_comfyui() == importable


def test_no_comfyui_is_a_sentence_that_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(CommandError, match=r"Expected --comfyui to be a folder with .* got "):
        host.find_comfyui(tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(CommandError, match="Expected COMFYUI_PATH to be a folder with"):
        host.find_comfyui()
    line = [sys.executable, "-m", "comfyui_deltaconv.cli", "distill"]
    environment = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Expected a ComfyUI" in done.stderr and "--comfyui" in done.stderr
