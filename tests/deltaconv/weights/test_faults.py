"""Saving and loading where something goes wrong meanwhile: nothing lost, nothing half."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from comfyui_deltaconv.deltaconv import (
    DeltaConvBlock,
    WeightsError,
    demo,
    read_weights,
    write_weights,
)
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
from comfyui_deltaconv.deltaconv.whole_file import WriteError
from faults import POSIX, contents, full_disk, open_folder, read_only

# Saves so many files of numbers that nobody took, all of one value.
NUMBERING = """
import sys
from pathlib import Path
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock, write_weights
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
folder, count, value = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
block = DeltaConvBlock(4, 3)
for parameter in block.parameters():
    torch.nn.init.constant_(parameter, value)
weights = weights_of_blocks({"a.attn1": block})
print("saving", flush=True)
sys.stdin.readline()
number = 1
while count:
    try:
        write_weights(weights, folder / f"both_{number:05}_.safetensors")
        count -= 1
    except FileExistsError:
        number += 1
"""
# Saves over one file, again and again, until it is killed.
SAVING = """
import sys
from pathlib import Path
from comfyui_deltaconv.deltaconv import read_weights, write_weights
source, target = map(Path, sys.argv[1:])
weights = read_weights(source)
print("saving", flush=True)
while True:
    write_weights(weights, target, overwrite=True)
"""


@POSIX
@pytest.mark.parametrize("kills", [2, pytest.param(200, marks=pytest.mark.long)])
def test_a_save_that_is_killed_leaves_the_file_before_it_or_the_one_after(tmp_path, kills):
    target, moments = tmp_path / "blocks.safetensors", random.Random(0)
    whole = demo.DELTACONV_PATH.stat().st_size
    for _ in range(kills):
        line = [sys.executable, "-I", "-c", SAVING, str(demo.DELTACONV_PATH), str(target)]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "saving\n"
            time.sleep(moments.uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
        if target.exists():
            assert len(read_weights(target, finite=True).sites) == 10
        # What was not finished has a hidden name, which no list of files shows.
        assert all(path == target or path.name.startswith(".") for path in tmp_path.iterdir())
        assert all(path.stat().st_size <= 2 * whole for path in tmp_path.iterdir())


@pytest.fixture
def loaded(tmp_path):
    path = tmp_path / "blocks.safetensors"
    shutil.copyfile(demo.DELTACONV_PATH, path)
    return path, read_weights(path)


def other_weights(weights):
    """As many blocks of the same layout, with other values."""
    blocks = {site: weights.block(site) for site in weights.sites}
    with torch.no_grad():
        for block in blocks.values():
            block.conv_out.weight.mul_(2)
    return weights_of_blocks(blocks, family=weights.family)


def test_a_file_that_is_replaced_while_it_is_loaded_is_said(loaded):
    path, weights = loaded
    site = next(iter(weights.sites))
    write_weights(other_weights(weights), path, overwrite=True)
    with pytest.raises(WeightsError, match="as it was when it was loaded, got another file"):
        weights.block(site)
    assert read_weights(path).block(site).conv_out.weight.isfinite().all()


def test_a_file_that_is_gone_is_said(loaded):
    path, weights = loaded
    path.unlink()
    with pytest.raises(WeightsError, match=r"blocks\.safetensors"):
        weights.block(next(iter(weights.sites)))


def test_a_clock_that_was_set_back_changes_nothing(loaded):
    path, weights = loaded
    os.utime(path, (1, 1))
    with pytest.raises(WeightsError, match="got another file in its place"):
        weights.block(next(iter(weights.sites)))
    assert len(read_weights(path).sites) == 10


@POSIX
def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    outside, folder = tmp_path / "outside.safetensors", tmp_path / "folder"
    outside.write_bytes(b"somebody else's")
    folder.mkdir()
    link = folder / "blocks.safetensors"
    link.symlink_to(outside)
    torch.manual_seed(0)
    weights = weights_of_blocks({"a.attn1": DeltaConvBlock(8, 3)})
    write_weights(weights, link, overwrite=True)
    assert outside.read_bytes() == b"somebody else's" and not link.is_symlink()


@POSIX
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_is_said_and_leaves_the_file_before_it(loaded, overwrite):
    path, weights = loaded
    before = contents(path.parent)
    target = path if overwrite else path.with_name("new.safetensors")
    with full_disk(room=100_000), pytest.raises(WriteError) as full:
        write_weights(weights, target, overwrite=overwrite)
    assert f"Cannot write {target.name}: expected 0.68 MB of room" in str(full.value)
    assert "Nothing there was changed: make room" in str(full.value)
    assert contents(path.parent) == before


@POSIX
def test_a_folder_that_may_not_be_written_to_is_said():
    weights = read_weights(demo.DELTACONV_PATH)
    with open_folder() as folder:
        path = write_weights(weights, folder / "blocks.safetensors")
        path.chmod(0o444)
        before = contents(folder)
        with read_only(folder):
            for overwrite in (False, True):
                target = path if overwrite else folder / "new.safetensors"
                with pytest.raises(WriteError, match=r"got Permission denied in .*allow writing"):
                    write_weights(weights, target, overwrite=overwrite)
        assert contents(folder) == before


def test_processes_that_save_into_one_folder_take_numbers_of_their_own(tmp_path):
    each = 150
    children = []
    for value in (1, 2):
        line = [sys.executable, "-I", "-c", NUMBERING, str(tmp_path), str(each), str(value)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen(line, **pipes))
    assert [child.stdout.readline() for child in children] == ["saving\n"] * 2
    for child in children:
        child.stdin.write("now\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=60)
    assert not any(child.returncode for child in children)
    names = [f"both_{number:05}_.safetensors" for number in range(1, 2 * each + 1)]
    assert sorted(contents(tmp_path)) == names
    values = [
        float(read_weights(tmp_path / name).state("a.attn1")["conv_up.weight"].flatten()[0])
        for name in names
    ]
    assert values.count(1) == values.count(2) == each
