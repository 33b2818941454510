"""Nodes that write or load where something goes wrong: nothing lost, nothing half, one sentence."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from comfyui_deltaconv.deltaconv import demo, read_weights
from faults import POSIX, contents, full_disk
from locality_reports import small_report

pytestmark = [pytest.mark.usefixtures("folders"), pytest.mark.any_comfyui]


@pytest.fixture
def output(folders):
    return folders / "output" / "deltaconv"


@POSIX
def test_save_says_that_the_disk_is_full(output):
    from comfyui_deltaconv.nodes.load_save import DeltaConvSave

    weights = read_weights(demo.DELTACONV_PATH)
    with full_disk(room=100_000), pytest.raises(ValueError, match=r"MB of room .* make room"):
        DeltaConvSave.execute(weights, "full")
    assert contents(output) == {}


@POSIX
def test_a_report_is_saved_whole_or_not_at_all(output):
    from comfyui_deltaconv.nodes.locality import DeltaConvSaveLocality

    report = small_report()
    # Room for the figures, not for the page with its pictures.
    assert len(report.to_json()) < 20_000
    with full_disk(room=20_000), pytest.raises(ValueError, match=r"MB of room .* make room"):
        DeltaConvSaveLocality.execute(report, "full")
    assert contents(output) == {}


def test_reports_saved_at_the_same_time_take_numbers_of_their_own(output, monkeypatch):
    """As two ComfyUIs over one folder do."""
    import folder_paths
    from comfyui_deltaconv.nodes.locality import DeltaConvSaveLocality

    asked = folder_paths.get_save_image_path(os.path.join("deltaconv", "both"), str(output.parent))
    # Both have asked before one of them wrote.
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *_: asked)
    with ThreadPoolExecutor(4) as pool:
        saves = [
            pool.submit(DeltaConvSaveLocality.execute, small_report(), "both") for _ in range(4)
        ]
        pairs = [save.result().args for save in saves]
    names = {os.path.splitext(os.path.basename(name))[0] for pair in pairs for name in pair}
    assert len(names) == 4 and all(len({name[:-5] for name in pair}) == 1 for pair in pairs)
    assert len(contents(output)) == 8


def test_a_file_of_the_same_size_and_time_is_another(folders):
    """As a copy has it that keeps times, or one that is made after the clock was set back."""
    from comfyui_deltaconv.nodes.load_save import DeltaConvLoad

    path = folders / "extra" / "blocks.safetensors"
    shutil.copyfile(demo.DELTACONV_PATH, path)
    before, status = DeltaConvLoad.fingerprint_inputs(path.name), path.stat()
    copy = path.with_name("copy")
    shutil.copyfile(demo.DELTACONV_PATH, copy)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(copy, path)
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert DeltaConvLoad.fingerprint_inputs(path.name) != before


@POSIX
def test_a_folder_that_leads_out_takes_no_distillation(folders, output):
    from comfyui_deltaconv.nodes.host.distillation import state_folder

    outside = folders / "outside"
    outside.mkdir()
    (output / "distillation").mkdir(parents=True)
    (output / "distillation" / "link").symlink_to(outside)
    for name in ("link", "link/deeper", "../../..", str(outside)):
        with pytest.raises(ValueError, match=r"Expected a folder name below .* Leave out \.\."):
            state_folder(name)
    assert not list(outside.iterdir())


def test_a_folder_that_is_removed_is_listed_no_more(output):
    """ComfyUI's own list fails there, and with it the page's list of all nodes."""
    from comfyui_deltaconv.nodes.host.folders import NO_FILE, offered_files

    output.mkdir(parents=True)
    shutil.copyfile(demo.DELTACONV_PATH, output / "blocks.safetensors")
    assert offered_files() == ["blocks.safetensors"]
    shutil.rmtree(output)
    assert offered_files() == [NO_FILE]


@pytest.mark.parametrize("name", [5, None, 1.5, True, {"a": 1}, "a\0b", "\ud800", "x" * 5000])
def test_what_is_no_name_is_refused_as_one_that_is_not_there(name):
    from comfyui_deltaconv.nodes.host.folders import find_file

    with pytest.raises(
        FileNotFoundError, match=r"which is not there\. Put the \.safetensors"
    ) as no:
        find_file(name)
    assert len(str(no.value)) < 1000
