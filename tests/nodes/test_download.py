"""Download ΔConv Weights: the node with the real huggingface_hub against a local server."""

import json

import pytest
from comfyui_deltaconv.deltaconv import demo
from comfyui_deltaconv.development.comfyui.client import PromptRefused
from hub_server import COMMIT, hub_of_this_process, sha256

DATA = demo.DELTACONV_PATH.read_bytes()
LABEL = "some/x.safetensors (a/b)"
SD15 = "SD1.5 (7eu7d7/ConvFusion)"


@pytest.fixture
def remote(monkeypatch, tmp_path):
    with hub_of_this_process(monkeypatch, tmp_path) as found:
        found.files = {"a/b": {"some/x.safetensors": DATA}}
        yield found


@pytest.fixture
def models(folders):
    """The folder models/deltaconv, whose repositories.json allows one file."""
    folder = folders / "models" / "deltaconv"
    row = {"repo": "a/b", "revision": COMMIT, "path": "some/x.safetensors", "sha256": sha256(DATA)}
    (folder / "repositories.json").write_text(json.dumps([row]), encoding="utf-8")
    return folder


@pytest.fixture
def node(models):
    from comfyui_deltaconv.nodes.download import DeltaConvDownload

    return DeltaConvDownload


@pytest.fixture
def shown(monkeypatch, node):
    """Every text that the node shows."""
    from comfyui_deltaconv.nodes import download
    from comfyui_deltaconv.nodes.host import node_text

    texts = []
    for module in (download, node_text):
        monkeypatch.setattr(module, "show_on_node", texts.append)
    return texts


def options(node):
    (entry,) = node.define_schema().inputs
    return entry.options


def test_it_downloads_shows_what_it_does_and_loads(remote, models, node, shown):
    import folder_paths

    assert "x.safetensors" not in folder_paths.get_filename_list("deltaconv")
    before = node.fingerprint_inputs(LABEL)
    weights = node.execute(LABEL).args[0]
    assert len(weights.sites) == 10 and (models / "x.safetensors").read_bytes() == DATA
    assert shown[0].startswith("asking a/b") and "0.7 of 0.7 MB" in shown
    assert shown[-1] == f"downloaded 0.7 MB from a/b into {models / 'x.safetensors'}"
    assert "x.safetensors" in folder_paths.get_filename_list("deltaconv")
    assert node.fingerprint_inputs(LABEL) != before
    remote.seen.clear()
    assert len(node.execute(LABEL).args[0].sites) == 10
    assert shown[-1].startswith("found ") and not remote.seen


def test_an_interruption_stops_it_and_the_next_run_goes_on(remote, models, node, shown):
    import comfy.model_management as management
    from comfyui_deltaconv.nodes import download

    remote.slow = 0.01

    def interrupting(text):
        if "MB" in text and not text.startswith("0.0"):
            management.interrupt_current_processing()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "show_on_node", interrupting)
        patch.setattr(download, "_BETWEEN", 0.0)
        with pytest.raises(management.InterruptProcessingException):
            node.execute(LABEL)
    (part,) = models.glob(".*.part")
    assert 0 < part.stat().st_size < len(DATA)
    assert len(node.execute(LABEL).args[0].sites) == 10
    assert "Range" in remote.gets()[-1]


def test_refusals_are_plain_errors_and_stand_on_the_node(remote, node, shown):
    remote.first = [(401, {})]
    with pytest.raises(ValueError, match="status 401") as error:
        node.execute(LABEL)
    assert type(error.value) is ValueError and shown[-1] == str(error.value)


def test_listing_and_checking_ask_nothing_of_the_network(remote, node, models):
    assert options(node) == [
        SD15,
        "SDXL (7eu7d7/ConvFusion)",
        "PixArt-Σ (7eu7d7/ConvFusion)",
        LABEL,
    ]
    assert node.validate_inputs(LABEL) is True and node.validate_inputs(None) is True
    assert "Expected one of sd15" in node.validate_inputs("https://example.org/x.safetensors")
    assert node.fingerprint_inputs(LABEL) == "" and not remote.seen


def test_a_wrong_list_of_the_users_leaves_the_packaged_ones(remote, node, models, caplog):
    (models / "repositories.json").write_text('[{"repo": "../.."}]', encoding="utf-8")
    assert len(options(node)) == 3
    assert "entry 1, repo" in caplog.text
    assert "entry 1, repo" in node.validate_inputs(LABEL)


def unfilled(monkeypatch):
    """The packaged list as it is before it is filled in."""
    from dataclasses import replace

    from comfyui_deltaconv.deltaconv.hub import entries

    none = {"revision": None, "path": None, "size": None, "sha256": None}
    listed = [replace(entry, **none) for entry in entries.published_entries()]
    monkeypatch.setattr(entries, "published_entries", lambda: listed)


def test_what_is_not_filled_in_says_where_to_put_the_file(
    remote, models, node, shown, monkeypatch, folders
):
    import torch
    from comfyui_deltaconv.deltaconv import DeltaConvBlock
    from published import published_paths
    from safetensors.torch import save_file

    unfilled(monkeypatch)
    said = node.validate_inputs(SD15)
    assert "huggingface.co/7eu7d7/ConvFusion/tree/main" in said and str(models) in said
    with pytest.raises(ValueError) as error:
        node.execute(SD15)
    assert str(error.value) == said == shown[-1]
    # In any folder of the user's, as the authors name their blocks.
    name = next(iter(published_paths("sd1").values()))
    torch.manual_seed(0)
    state = DeltaConvBlock(320, 7).half().state_dict()
    path = folders / "extra" / "ConvFusion.safetensors"
    save_file({f"{name}.conv1.{key}": tensor for key, tensor in state.items()}, path)
    assert node.validate_inputs(SD15) is True and node.fingerprint_inputs(SD15)
    assert "DreamShaper" in node.execute(SD15).args[0].base_model
    assert shown[-1].startswith(f"found {path}") and not remote.seen


def prompt(file):
    inputs = {"deltaconv": ["1", 0], "filename_prefix": "downloaded"}
    return {
        "1": {"class_type": "DeltaConvDownload", "inputs": {"file": file}},
        "2": {"class_type": "DeltaConvSave", "inputs": inputs},
    }


def test_a_server_lists_the_files_and_loads_what_is_there(server):
    folder = server.base / "models" / "deltaconv"
    row = {"repo": "a/b", "revision": COMMIT, "path": "by/hand.safetensors"}
    configuration, file = folder / "repositories.json", folder / "hand.safetensors"
    configuration.write_text(json.dumps([row]), encoding="utf-8")
    file.write_bytes(DATA)
    try:
        kind, options = server.object_info()["DeltaConvDownload"]["input"]["required"]["file"]
        listed = options["options"] if kind == "COMBO" else kind
        assert listed[0] == SD15 and listed[-1] == "by/hand.safetensors (a/b)"
        assert server.queue(prompt(listed[-1]))["status"]["completed"]
        with pytest.raises(PromptRefused, match="Expected one of sd15, sdxl, pixart, hand, got"):
            server.queue(prompt("https://example.org/x.safetensors"))
    finally:
        configuration.unlink()
        file.unlink()
    (saved,) = (server.base / "output" / "deltaconv").glob("downloaded_*.safetensors")
    saved.unlink()
