"""Files from the hub: the real huggingface_hub against a server on 127.0.0.1.

The server answers plainly, and with the redirect to storage that files in LFS and Xet have. Not
covered: the hub itself, its certificates and its storage's, Xet's own protocol (which is not used:
files in Xet storage come by their plain address), and a proxy.
"""

import builtins
import errno
import json
import logging
import os
import pickle
import threading
from collections import namedtuple
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock, demo, hub
from comfyui_deltaconv.deltaconv.families import FAMILIES
from comfyui_deltaconv.deltaconv.hub import DownloadError, Entry, client, entries, fetch
from hub_server import COMMIT, hub_of_this_process, serving, sha256
from published import published_paths
from safetensors.torch import save, save_file

DATA = demo.DELTACONV_PATH.read_bytes()
SIZE = len(DATA)
ENTRY = Entry(
    "sd15", "SD1.5 (a/b)", "a/b", COMMIT, "some/x.safetensors", SIZE, sha256(DATA), family="sd1"
)
OWN = replace(ENTRY, family="", size=None, sha256=None, revision="main")


def quietly(done, total):
    pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "_PAUSE", 0.01)
    with hub_of_this_process(monkeypatch, tmp_path) as found:
        found.files = {"a/b": {"some/x.safetensors": DATA}}
        yield found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "models" / "deltaconv"


def download(entry, folder, progress=quietly):
    return hub.download(entry, folder, progress)


def refused(entry, folder, words, kept=()):
    """The sentence with which a download is refused, which leaves only `kept` files."""
    with pytest.raises(DownloadError, match=words) as error:
        download(entry, folder)
    left = [path.name for path in folder.glob("*") if path.suffix != ".lock"]
    assert sorted(left) == sorted(kept)
    return str(error.value)


@pytest.mark.parametrize("entry", [ENTRY, OWN], ids=["packaged", "own"])
def test_a_file_comes_whole_and_under_its_name_alone(server, folder, entry):
    steps = []
    found = download(entry, folder, lambda *step: steps.append(step))
    assert found.path == folder / "x.safetensors" and found.path.read_bytes() == DATA
    assert [path.name for path in folder.iterdir()] == ["x.safetensors"]
    assert steps[0] == (0, 0) and steps[-1] == (SIZE, SIZE)
    assert "0.7 MB from a/b" in found.note() and str(found.path) in found.note()
    server.seen.clear()
    assert download(entry, folder).path == found.path and not server.seen


def test_a_file_in_storage_comes_without_the_token_leaving_the_hub(server, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    with serving() as (storage, address):
        storage.files, server.storage = server.files, address
        trusted = client.is_trusted

        def with_storage(url, endpoint):
            return url.startswith(address) or trusted(url, endpoint)

        monkeypatch.setattr(client, "is_trusted", with_storage)
        assert download(ENTRY, folder).path.read_bytes() == DATA
        assert [method for method, _, _ in server.seen] == ["HEAD", "GET"]
        assert all(h["authorization"] == "Bearer hf_of_the_test" for _, _, h in server.seen)
        (asked,) = storage.gets()
        assert "authorization" not in map(str.lower, asked)


def test_an_interrupted_download_goes_on_where_it_was(server, folder):
    class Interrupted(Exception):
        pass

    def interrupt(done, total):
        if done > SIZE // 3:
            raise Interrupted

    server.slow = 0.01
    with pytest.raises(Interrupted):
        download(ENTRY, folder, interrupt)
    (part,) = folder.glob(".x.safetensors.*.part")
    assert not list(folder.glob("*.safetensors"))
    begun = part.stat().st_size
    assert SIZE // 3 < begun < SIZE
    assert download(ENTRY, folder).path.read_bytes() == DATA
    assert server.gets()[-1]["Range"] == f"bytes={begun}-"
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_opened_again(server, folder, ranges):
    server.cut, server.ranges = [100_000, 200_000], ranges
    assert download(ENTRY, folder).path.read_bytes() == DATA
    assert len(server.gets()) == 3


def test_a_body_that_is_always_cut_is_said_and_kept_for_the_next_time(server, folder):
    server.cut = [50_000] * 5
    part = f".x.safetensors.{ENTRY.sha256[:16]}.part"
    said = refused(ENTRY, folder, f"Expected {SIZE} bytes .* got 250000 before", kept=[part])
    assert "run this again" in said
    assert download(ENTRY, folder).path.read_bytes() == DATA


def test_parts_of_another_file_or_too_long_ones_are_not_gone_on_from(server, folder):
    folder.mkdir(parents=True)
    (folder / f".x.safetensors.{'0' * 16}.part").write_bytes(b"another")
    (folder / f".x.safetensors.{ENTRY.sha256[:16]}.part").write_bytes(DATA + b"more")
    assert download(ENTRY, folder).path.read_bytes() == DATA
    assert "Range" not in server.gets()[0] and len(list(folder.iterdir())) == 1


def test_a_range_that_the_hub_does_not_have_is_begun_anew(server, folder, monkeypatch):
    monkeypatch.setattr(client, "_ask", lambda entry: client.Remote(SIZE, ENTRY.sha256))
    folder.mkdir(parents=True)
    (folder / f".x.safetensors.{ENTRY.sha256[:16]}.part").write_bytes(DATA[:1000])
    server.first = [(416, {})]
    assert download(ENTRY, folder).path.read_bytes() == DATA
    assert ["Range" in headers for headers in server.gets()] == [True, False]


def test_redirects_without_an_end_are_refused(server, folder):
    location = {"Location": "/elsewhere"}
    server.first = [(200, {"Content-Length": str(SIZE)})] + [(302, location)] * 9
    part = f".x.safetensors.{ENTRY.sha256[:16]}.part"
    refused(ENTRY, folder, "more than 5 redirects", kept=[part])


def test_a_damaged_part_is_found_out(server, folder):
    folder.mkdir(parents=True)
    (folder / f".x.safetensors.{ENTRY.sha256[:16]}.part").write_bytes(b"\0" * 1000)
    refused(ENTRY, folder, "Expected .* with the SHA-256")
    assert download(ENTRY, folder).path.read_bytes() == DATA


def test_a_hash_that_differs_on_its_way_is_refused(server, folder):
    server.instead = DATA[:-1] + b"!"
    refused(ENTRY, folder, f"with the SHA-256 {ENTRY.sha256}, got {sha256(server.instead)}")
    refused(OWN, folder, f"with the SHA-256 {ENTRY.sha256}, got")


def test_another_file_on_the_hub_is_refused_before_it_is_read(server, folder):
    refused(replace(ENTRY, sha256="0" * 64), folder, f"0{{64}}, got {ENTRY.sha256} on the hub")
    refused(replace(ENTRY, size=5), folder, f"with 5 bytes, got one with {SIZE}")
    assert not server.gets()


def test_more_bytes_than_were_said_are_refused(server, folder):
    server.instead = DATA + b"more"
    part = f".x.safetensors.{ENTRY.sha256[:16]}.part"
    refused(ENTRY, folder, f"Expected {SIZE} bytes .*, got more", kept=[part])
    assert (folder / part).stat().st_size == 0


def test_an_own_entry_needs_a_hash_from_somewhere(server, folder):
    server.large = False
    refused(OWN, folder, "Add sha256 to the entry")
    assert download(replace(OWN, sha256=ENTRY.sha256), folder).path.is_file()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pickle.dumps({"weights": [1.0]}), "got a pickle"),
        (b"PK\x03\x04" + b"\0" * 60, "got a pickle"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (save({"model.weight": torch.zeros(2)}), "Is this a checkpoint or a LoRA"),
        (DATA[: SIZE // 2], "cut short"),
    ],
    ids=["pickle", "torch's zip", "page", "checkpoint", "half"],
)
def test_the_right_hash_of_no_deltaconv_file_is_refused(server, folder, data, words):
    server.files["a/b"]["some/x.safetensors"] = data
    said = refused(replace(ENTRY, size=len(data), sha256=sha256(data)), folder, words)
    assert "came whole, but is no ΔConv file" in said and ".part" not in said


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {"X-Error-Code": "RepoNotFound"}, "status 401: the repository is private"),
        (401, {}, "status 401: the repository is private"),
        (403, {"X-Error-Code": "GatedRepo"}, "status 403.*HF_TOKEN"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "status 404: there is no such file"),
        (429, {"Retry-After": "3600"}, "Try again in 3600 s"),
        (429, {}, "Try again later"),
        (503, {}, "status 503. Try again later"),
    ],
)
@pytest.mark.parametrize("on", ["HEAD", "GET"])
def test_refusals_of_the_hub_are_sentences(server, folder, monkeypatch, status, headers, words, on):
    if on == "HEAD":
        server.first = [(status, headers)]
    else:
        monkeypatch.setattr(client, "_ask", lambda entry: client.Remote(SIZE, ENTRY.sha256))
        server.first = [(status, headers)]
    part = f".x.safetensors.{ENTRY.sha256[:16]}.part"
    refused(ENTRY, folder, words, kept=[part] if on == "GET" else [])
    assert [method for method, _, _ in server.seen] == [on]


def test_a_short_retry_after_is_waited_for_and_may_be_interrupted(server, folder):
    server.first = [(429, {"Retry-After": "1"}), (429, {"Retry-After": "0"})]
    assert download(ENTRY, folder).path.is_file()
    (folder / "x.safetensors").unlink()
    server.first = [(429, {"Retry-After": "50"})]
    calls = iter(range(3))
    with pytest.raises(StopIteration):
        download(ENTRY, folder, lambda done, total: next(calls))


def test_retry_after_is_read_as_seconds_or_a_date():
    date = datetime.now(timezone.utc) + timedelta(seconds=100)
    assert client._seconds(" 7 ") == 7
    assert 90 < client._seconds(format_datetime(date)) <= 100
    assert client._seconds(format_datetime(date - timedelta(days=1))) == 0
    assert client._seconds("soon") is client._seconds("") is None


@pytest.mark.parametrize("late", [False, True], ids=["HEAD", "GET"])
def test_a_redirect_to_another_host_is_not_followed(server, folder, late):
    with serving() as (other, address):
        other.files, server.late = server.files, late
        server.storage = address.replace("127.0.0.1", "localhost")
        part = [f".x.safetensors.{ENTRY.sha256[:16]}.part"] if late else []
        said = refused(ENTRY, folder, "got a redirect to localhost", kept=part)
        assert "signature" not in said and not other.seen


@pytest.mark.parametrize(
    ("url", "trusted"),
    [
        ("https://huggingface.co/x", True),
        ("https://cas-bridge.xethub.hf.co/x?y", True),
        ("https://cdn-lfs-us-1.huggingface.co/x", True),
        ("https://mirror.example:8443/x", True),
        ("https://cdn-lfs.hf.co:443/x", True),
        ("http://cdn-lfs.hf.co/x", False),
        ("https://cdn-lfs.hf.co:8080/x", False),
        ("https://evilhf.co/x", False),
        ("https://hf.co.evil.example/x", False),
        ("https://huggingface.co@evil.example/x", False),
        ("https://evil.example\\@huggingface.co/x", False),
        ("https://mirror.example/x", False),
        ("http://mirror.example:8443/x", False),
        ("file:///etc/passwd", False),
        ("https://127.0.0.1/x", False),
    ],
)
def test_hosts_that_are_trusted(url, trusted):
    assert client.is_trusted(url, "https://mirror.example:8443") is trusted


NAMES = [
    ("repo", ["a", "a/b/c", "../b", "a/..", "a/b..c", "a//b", "/a/b", "a\\b", "a/b?x", "a/b#", ""]),
    ("revision", ["", "../x", "a/../b", "a b", "/x", "a\\b", "x?y", "refs//pr"]),
    (
        "path",
        [
            "x.bin", "x.ckpt", "x.safetensors.bin", "../x.safetensors", "a/../x.safetensors",
            "/x.safetensors", "a\\x.safetensors", "C:x.safetensors", "C:/x.safetensors",
            "a//x.safetensors", ".x.safetensors", "a/.x.safetensors", ".safetensors",
            "x\n.safetensors", "x%2e%2e.safetensors", "a?b.safetensors", "x.safetensors\n",
            "x" * 300 + ".safetensors", "",
        ],
    ),
    ("sha256", ["0", "0" * 63, "G" * 64, "A" * 64]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in NAMES for value in values]
)
def test_names_that_lead_elsewhere_are_refused(folder, field, value):
    row = {"repo": "a/b", "revision": "main", "path": "y.safetensors", field: value}
    configure(folder, [row])
    with pytest.raises(ValueError, match=f"entry 1, {field}: expected") as error:
        hub.known_entries(folder)
    assert len(str(error.value)) < 500


def configure(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = rows if isinstance(rows, str) else json.dumps(rows)
    (folder / "repositories.json").write_text(text, encoding="utf-8")


def test_a_users_file_adds_to_the_packaged_list(folder):
    packaged = hub.known_entries(folder)
    assert [entry.name for entry in packaged] == ["sd15", "sdxl", "pixart"]
    configure(folder, [{"repo": "c/d", "revision": "v1", "path": "e/f.safetensors", "size": 3}])
    entry = hub.known_entries(folder)[-1]
    assert entry == Entry("f", "e/f.safetensors (c/d)", "c/d", "v1", "e/f.safetensors", 3)
    assert hub.find_entry("f", folder) == hub.find_entry(entry.label, folder) == entry
    assert hub.find_entry("SD1.5 (7eu7d7/ConvFusion)", folder) == packaged[0]
    with pytest.raises(ValueError, match="Expected one of sd15, sdxl, pixart, f, got 'g'"):
        hub.find_entry("g", folder)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "Invalid JSON"),
        ("{}", "the list: Input should be a valid"),
        ("[" * 10_000, "Invalid JSON"),
        ([{"repo": "a/b", "revision": "main"}], "entry 1, path: Field required"),
        ([{"repo": "a/b", "revision": "main", "path": "x.safetensors", "url": "y"}], "url: Extra"),
        ([{"repo": "a/b", "revision": "m", "path": "x.safetensors", "size": "3"}], "1, size"),
        ([{"repo": "a/b", "revision": "m", "path": "x.safetensors", "size": -3}], "1, size"),
        (
            [{"repo": f"{a}/b", "revision": "m", "path": f"{a}/{a}.safetensors"} for a in "xX"],
            "entry 2: another file is stored as X.safetensors",
        ),
        (" " * 2_000_000, "at most"),
    ],
)
def test_a_wrong_file_of_the_users_is_a_sentence(folder, rows, words):
    configure(folder, rows)
    with pytest.raises(ValueError, match=words) as error:
        hub.known_entries(folder)
    assert "repositories.json cannot be used" in str(error.value)
    # Packaged entries need nothing of it.
    assert hub.find_entry("sdxl", folder).family == "sdxl"


def test_the_packaged_list_has_no_problem_but_what_is_not_filled_in():
    for entry in hub.published_entries():
        assert entry.family in FAMILIES and entry.base_model and entry.packaged
        found = entries.unfilled(entry)
        assert all("got none" in sentence for sentence in found)
        assert bool(found) is not entry.filled


def test_offline_is_one_sentence(server, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused(ENTRY, folder, "HF_HUB_OFFLINE, which forbids it")
    assert str(folder) in said and not server.seen


def test_no_network_is_one_sentence(server, folder, monkeypatch):
    from huggingface_hub import constants

    with serving() as (_, gone):
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone)
    template = gone + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    refused(ENTRY, folder, "Expected an answer of 127.0.0.1, got no connection")


def test_a_disk_without_room_is_found_before_the_file_is_read(server, folder, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: Usage(9, 0, fetch.ROOM))
    refused(ENTRY, folder, "of free disk")
    assert not server.gets()


def test_a_disk_that_fills_up_is_said_and_the_part_stays(server, folder, monkeypatch):
    def full(path, mode):
        file = open(path, mode, buffering=0)
        write = file.write

        class Filling:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, chunk):
                if file.tell() > 100_000:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(chunk)

        return Filling()

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "open", full, raising=False)
        part = f".x.safetensors.{ENTRY.sha256[:16]}.part"
        refused(ENTRY, folder, "got a full disk", kept=[part])
    assert (folder / part).stat().st_size > 100_000
    assert download(ENTRY, folder).path.read_bytes() == DATA


def test_a_folder_that_may_not_be_written_to_is_said(server, folder, monkeypatch):
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        # To the superuser nothing is forbidden, so the system's answer is given here.
        def forbidden(path, *arguments, **options):
            if str(path).startswith(str(folder)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return true_open(path, *arguments, **options)

        true_open = os.open
        monkeypatch.setattr(os, "open", forbidden)
    refused(ENTRY, folder, "Expected a folder that may be written to")
    assert not server.seen


def test_a_folder_below_a_file_is_said(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="Expected to write into"):
        download(ENTRY, tmp_path / "file" / "deltaconv")


def test_two_downloads_of_one_file_make_one(server, folder):
    server.slow, found, waited = 0.01, [], []

    def run():
        found.append(download(ENTRY, folder, lambda done, total: waited.append(total)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.path for each in found] == [folder / "x.safetensors"] * 3
    assert found[0].path.read_bytes() == DATA and len(server.gets()) == 1
    assert [path.name for path in folder.iterdir()] == ["x.safetensors"]


def test_a_token_is_sent_and_stands_nowhere(server, folder, monkeypatch, caplog, capfd):
    token = "hf_secret_of_the_test"
    monkeypatch.setenv("HF_TOKEN", token)
    # As ComfyUI logs. Below that, httpx writes what a server answers, which may be anything.
    caplog.set_level(logging.INFO)
    said = []
    for status in (401, 403, 404, 429, 500):
        server.first = [(status, {"X-Error-Message": f"bad {token}"})]
        said.append(refused(ENTRY, folder, "status"))
    server.instead = DATA[:-1] + b"!"
    said.append(refused(ENTRY, folder, "SHA-256"))
    server.instead = None
    said.append(download(ENTRY, folder).note())
    assert all(headers["authorization"] == f"Bearer {token}" for _, _, headers in server.seen)
    said += [caplog.text, *capfd.readouterr()]
    assert not any(token in text for text in said)
    assert not any(token.encode() in path.read_bytes() for path in folder.rglob("*"))


def test_what_is_not_filled_in_says_where_the_file_is(server, folder):
    for entry in hub.published_entries():
        if not entry.filled:
            said = refused(entry, folder, "does not know it yet")
            assert entry.page in said and str(folder) in said and entry.base_model in said
            assert said.startswith("Expected ")
    assert not server.seen


def published(family, path, dim=None):
    """A file as the authors publish it, with one block."""
    site, name = next(iter(published_paths(family).items()))
    state = DeltaConvBlock(FAMILIES[family].dims[site], 3).half().state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.conv1.{key}": tensor for key, tensor in state.items()}, path)
    return path


def test_a_file_put_there_by_hand_is_found_by_its_blocks(server, folder):
    entry = replace(ENTRY, revision=None, path=None, size=None, sha256=None)
    published("pixart", folder / "other.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"no")
    refused(entry, folder, "does not know", kept=["damaged.safetensors", "other.safetensors"])
    path = published("sd1", folder / "any name.safetensors")
    assert download(entry, folder).path == path and not server.seen
    published("sd1", folder / "second.safetensors")
    with pytest.raises(ValueError, match=r"Expected one file .*second\..*Choose one"):
        download(entry, folder)


def test_a_file_put_there_by_hand_is_found_by_its_name_and_compared(server, folder):
    folder.mkdir(parents=True)
    (folder / "x.safetensors").write_bytes(DATA)
    assert download(ENTRY, folder).note() == f"found {folder / 'x.safetensors'}"
    assert "was not compared" in download(OWN, folder).note()
    (folder / "x.safetensors").write_bytes(DATA[:-1] + b"!")
    assert "its hash is another" in download(ENTRY, folder).note()
    assert not server.seen


def test_nothing_is_opened_for_writing_outside_the_folder(server, folder, monkeypatch):
    opened, true_open = [], builtins.open

    def watched(path, mode="r", *arguments, **options):
        if set(mode) & set("wax+"):
            opened.append(str(path))
        return true_open(path, mode, *arguments, **options)

    with ExitStack() as stack:
        patch = stack.enter_context(monkeypatch.context())
        patch.setattr(builtins, "open", watched)
        download(ENTRY, folder)
    assert opened and all(path.startswith(str(folder)) for path in opened)
