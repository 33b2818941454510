"""Files that mean harm, and what reading one costs, by a child process of its own."""

import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from comfyui_deltaconv.deltaconv import demo
from comfyui_deltaconv.deltaconv.families import FAMILIES
from comfyui_deltaconv.deltaconv.geometry import BlockGeometry
from comfyui_deltaconv.deltaconv.weights.header import LARGEST_HEADER, LONGEST_KEY, MOST_TENSORS
from published import published_paths

MEBI = 1 << 20
# What a header of the largest size costs beside twice the file: 42 MiB measured at most, where one
# wide character makes all others wide.
FIXED = 64 * MEBI
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")

# Reads one file in a child of its own each: the memory of one is not that of the next.
_READER = """
import json, os, sys, time
from pathlib import Path

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

def read(path):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, start = status("VmRSS"), time.process_time()
    try:
        what = "read", read_one(Path(path))
    except REFUSED as error:
        what = "refused", str(error)
    except BaseException as error:
        what = "crashed", repr(error)[:500]
    return *what, time.process_time() - start, status("VmHWM") - before

for path in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork() == 0:
        print(json.dumps(read(path)), flush=True)
        os._exit(0)
    os.wait()
"""


def framed(header, data=0):
    """A file of that header, as text or as what JSON makes of it, and `data` zero bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def empty(keys):
    """A header of empty tensors; written by hand, because millions take json long."""
    entry = b'":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(b'"' + key.encode() + entry for key in keys) + b"}"


def blocks(paths, extra=(), geometry=lambda path: BlockGeometry(4, 1, 1)):
    """A header of blocks, tiny ones unless told, and how many bytes of data it needs."""
    header, end = {}, 0
    for path in paths:
        for name, shape in (*geometry(path).shapes().items(), *extra):
            size = 2 * torch.Size(shape).numel()
            entry = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
            header[f"{path}.{name}"], end = entry, end + size
    return header, end


def with_metadata(metadata):
    header, end = blocks(["blocks.0.attn"])
    return framed({"__metadata__": metadata, **header}, end)


def long_keys(part, count=14_000):
    """As many keys of the greatest length as fit, made of one part, again and again."""
    room = LONGEST_KEY - 8
    return empty(f"{(part * room)[:room]}.{number}" for number in range(count))


def changed(change=lambda header, first, second: None, before=""):
    """A block whose header `change` edits, given two of its keys; `before` stands at its front."""
    header, end = blocks(["blocks.0.attn"])
    change(header, *list(header)[:2])
    return framed(("{" + before + json.dumps(header)[1:]).encode(), end)


def again(shape):
    """The first tensor once more at the front, of that shape."""
    header, _ = blocks(["blocks.0.attn"])
    key = next(iter(header))
    return f"{json.dumps(key)}:{json.dumps({**header[key], 'shape': shape})},"


def with_entry(**entry):
    return changed(lambda header, first, second: header[first].update(entry))


def torch_file():
    file = io.BytesIO()
    torch.save({"a.conv1.conv_up.weight": torch.zeros(1000)}, file)
    return file.getvalue()


def zip_file():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b" * 1000)
    return file.getvalue()


NEAR = LARGEST_HEADER - 1000
# Refused in milliseconds, by what stands in a short header, or before one is read.
QUICK = {
    "a size that overflows": lambda: with_entry(shape=[2**62, 2**62]),
    "a size beyond 64 bits": lambda: with_entry(shape=[2**64]),
    "the same bytes twice": lambda: changed(lambda h, a, b: h[b].update(h[a])),
    "a gap": lambda: changed(lambda h, a, b: h.pop(a)),
    "bytes after the last": lambda: changed() + b"x",
    "fewer bytes than the shape": lambda: with_entry(shape=[9, 9]),
    "more bytes than the shape": lambda: with_entry(shape=[1]),
    "more bytes than the dtype": lambda: with_entry(dtype="F8_E4M3"),
    "an unknown dtype": lambda: with_entry(dtype="F1"),
    "a negative shape": lambda: with_entry(shape=[-1, -4]),
    "a shape of zeros": lambda: with_entry(shape=[0, 4], data_offsets=[0, 0]),
    "a shape of fractions": lambda: with_entry(shape=[2.5]),
    "offsets before the start": lambda: with_entry(data_offsets=[-8, 0]),
    "offsets backwards": lambda: with_entry(data_offsets=[8, 0]),
    "offsets at the end of 64 bits": lambda: with_entry(data_offsets=[2**64 - 8, 2**64 - 1]),
    "a key twice": lambda: changed(before=again([4, 4])),
    "a key twice, of two shapes": lambda: changed(before=again([16])),
    "a field twice": lambda: changed(before='"x":{"dtype":"F16","dtype":"F32"},'),
    "lists, a thousand deep": lambda: framed(b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}"),
    "a length of 2^62": lambda: struct.pack("<Q", 2**62) + changed()[8:],
    "100 MB of metadata": lambda: framed({"__metadata__": {"a": "b" * 10**8}}),
}
REFUSED = {
    **QUICK,
    "empty": lambda: b"",
    "seven bytes": lambda: b"1234567",
    "pickle": lambda: pickle.dumps({"a": bytes(MEBI)}),
    "torch": torch_file,
    "zip": zip_file,
    "gguf": lambda: b"GGUF" + bytes(MEBI),
    "png": lambda: b"\x89PNG\r\n\x1a\n" + bytes(MEBI),
    "text": lambda: b"these are words\n" * 100_000,
    "page": lambda: b"<!DOCTYPE html><html>" + b"<p>" * 10_000,
    "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "noise": lambda: os.urandom(20 * MEBI),
    "truncated": lambda: demo.DELTACONV_PATH.read_bytes()[:-1],
    "cut in the header": lambda: demo.DELTACONV_PATH.read_bytes()[:500],
    "20 000 dots": lambda: framed(empty(["a" + "." * 20_000])),
    "200 000 dots": lambda: framed(empty(["a." * 200_000])),
    "a key of 7 MiB": lambda: framed(empty(["a" * (7 * MEBI)])),
    "1.3 million tensors": lambda: framed(empty(["a.b.c"] * 1_300_000)),
    "140 000 tensors": lambda: framed(empty(map(str, range(140_000)))),
    "tensors at the bound": lambda: framed(empty(f"a.b.{n}" for n in range(MOST_TENSORS))),
    "the same key 20 000 times": lambda: framed(empty(["a.b.c"] * MOST_TENSORS)),
    "metadata twice": lambda: framed(b'{"__metadata__":{},"__metadata__":{}}'),
    "wide characters": lambda: framed({"__metadata__": {"a": "b" * (NEAR - 8) + "😀"}}),
    "escapes": lambda: framed(b'{"__metadata__":{"a":"' + rb"\"" * (NEAR // 2) + b'"}}'),
    "backslashes": lambda: framed(b'{"__metadata__":{"a":"' + rb"\\" * (NEAR // 2) + b'"}}'),
    "9 900 entries of metadata": lambda: framed(
        {"__metadata__": {f"{'k' * 300}{n}": "v" * 400 for n in range(9_900)}}
    ),
    "a million entries of metadata": lambda: framed(
        {"__metadata__": {str(n): "" for n in range(1_000_000)}}
    ),
    "spaces": lambda: framed(b"{" + b" " * NEAR + b"}"),
    "quotes": lambda: framed(b"{" + b'"' * NEAR),
    "open lists": lambda: framed(b'{"a":' + b"[" * NEAR),
    "open objects": lambda: framed(b'{"a":' * (NEAR // 5)),
    "lists in lists": lambda: framed(b'{"a":' + b"[" * 9_000 + b"]" * 9_000 + b"}"),
    "a long shape": lambda: framed(
        b'{"a":{"dtype":"F16","data_offsets":[0,0],"shape":[0' + b",0" * (NEAR // 2 - 100) + b"]}}"
    ),
    "a shape at the bound": lambda: framed(
        b'{"a":{"dtype":"F16","data_offsets":[0,0],"shape":[0' + b",0" * 300_000 + b"]}}"
    ),
    "a long number": lambda: framed(b'{"a":' + b"1" * NEAR + b"}"),
    "objects in a string": lambda: framed({"__metadata__": {"a": "{" * NEAR}}),
    "colons": lambda: framed(long_keys("a:")),
    "dots": lambda: framed(long_keys("a.")),
    "words": lambda: framed(long_keys("aaaaaaaaa")),
    "gates": lambda: framed(long_keys("x.gates.1.conv_spatial.")),
    "digits": lambda: framed(long_keys("x.gates.11111111111111111111111111")),
    "prefixes": lambda: framed(long_keys("a:b.transformer_blocks.0.conv1x.")),
    "paths": lambda: framed(long_keys("down_blocks.0.attentions.0.transformer_blocks.0.")),
    "many published sets": lambda: framed(
        *blocks(f"set{n}.transformer_blocks.0.conv1" for n in range(2_800))
    ),
    "many sets beside an EMA set": lambda: framed(
        *blocks([f"set{n}.transformer_blocks.{n}.conv1" for n in range(2_790)] + ["ema.x.conv1"])
    ),
    "many unknown paths": lambda: framed(
        *blocks(f"down_blocks.9.attentions.0.transformer_blocks.{n}.conv1" for n in range(2_000))
    ),
    "a crowded block": lambda: framed(
        *blocks(["blocks.0.attn"], [(f"{'x' * 300}{n}", (1,)) for n in range(19_000)])
    ),
    "a crowded published block": lambda: framed(
        *blocks(["transformer_blocks.0.conv1"], [(f"{'x' * 300}{n}", (1,)) for n in range(19_000)])
    ),
    "sites as lists": lambda: with_metadata({"deltaconv.sites": "[" + "[]," * 300_000 + "[]]"}),
    "sites too long": lambda: with_metadata({"deltaconv.sites": "[]," * (2 * MEBI)}),
    "training too deep": lambda: with_metadata({"deltaconv.training": "[" * MEBI}),
    "a kernel of digits": lambda: with_metadata(
        {"deltaconv.sites": '{"blocks.0.attn": {"kernel": ' + "9" * 4000 + "}}"}
    ),
    "a long family": lambda: with_metadata({"deltaconv.family": "f" * (7 * MEBI)}),
    "a long gate": lambda: with_metadata({"deltaconv.gate": "g" * (7 * MEBI)}),
}
READ = {
    "a long base": lambda: with_metadata({"deltaconv.base_model": "b" * (7 * MEBI)}),
    "many sites": lambda: framed(*blocks(f"{'deep.' * 20}{n}.attn" for n in range(2_800))),
    "sites with strange digits": lambda: framed(*blocks(["blocks.².attn", "blocks.٣.attn"])),
    "packaged": lambda: demo.DELTACONV_PATH.read_bytes(),
}


def sparse(path, length, header=b"{}", size=8 << 30):
    """A file of `size` bytes that takes no room on disk."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + header)
        file.truncate(size)


def specials(folder):
    """What no bytes can make: a folder, a pipe, devices, huge files; name → path."""
    paths = {name: folder / f"{name}.safetensors" for name in ("folder", "pipe", "socket")}
    paths["folder"].mkdir()
    os.mkfifo(paths["pipe"])
    socket.socket(socket.AF_UNIX).bind(str(paths["socket"]))
    for name in ("zero", "random"):
        paths[name] = folder / f"{name}.safetensors"
        paths[name].symlink_to(f"/dev/{name}")
    for name, length in {
        "8 GiB": 2**62,
        "8 GiB, header of 4": 4 << 30,
        "8 GiB of text": 50,
    }.items():
        paths[name] = folder / f"{name}.safetensors"
        sparse(paths[name], length)
    return paths


def full_checkpoint(folder):
    """SDXL's 70 blocks in a checkpoint of 3 000 tensors and 6 GB."""
    sdxl = FAMILIES["sdxl"]
    geometries = {
        f"model.unet.{path}.conv1": BlockGeometry(sdxl.dims[site], sdxl.published_kernel(site), 2)
        for site, path in published_paths("sdxl").items()
    }
    header, end = blocks(geometries, geometry=geometries.get)
    for number in range(2_500):
        size = 2_400_000
        key = f"model.unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.{number}.weight"
        header[key] = {"dtype": "F16", "shape": [size // 2], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = folder / "checkpoint.safetensors"
    sparse(path, len(text), text, 8 + len(text) + end)
    return path


def allowance(path):
    """Bytes of memory that reading the file may take."""
    return FIXED + 2 * (path.stat().st_size if path.is_file() else 0)


def readings(paths, reader):
    """Each path → ("read" | "refused" | "crashed", message, CPU seconds, bytes of memory).

    `reader` is the source of read_one(path) → text, and of REFUSED, what it may raise.
    """
    line = [sys.executable, "-I", "-c", reader + _READER, *map(str, paths)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(paths), done.stderr
    return found
