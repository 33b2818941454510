"""Random inputs for whatever reads what strangers made.

As a script it runs in a process of its own, which may write into one folder alone, and start, open
and ask nothing else:

    python -I tests/support/fuzzing.py FOLDER TARGET … [--inputs N] [--seed S] [--comfyui TREE]
    python tests/support/fuzzing.py FOLDER TARGET --atheris SECONDS

The second form is guided by coverage and needs `pip install atheris`, which no test does.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# In seconds of CPU time, for one input.
LONGEST = 1.0
# Beside twice the input: what Python and torch take in pages of their own, see hostile_files.
MEMORY = 64 << 20


@dataclass(frozen=True)
class Target:
    """Inputs to begin from, the first of them whole, and what reads one → whether it was taken.

    `read` raises where an input is neither taken nor refused as it should be.
    """

    seeds: Sequence[bytes]
    read: Callable[[bytes], bool]
    # Makes another input of one; bytes are changed anywhere without it, and now and then with it.
    mutate: Callable[[bytes, random.Random], bytes] | None = None
    only: bool = False
    # Bytes for each input that a library keeps for good, whatever we do.
    kept: int = 0

    def input(self, rng: random.Random) -> bytes:
        """A seed, changed once or a few times."""
        data = rng.choice(self.seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            structured = self.mutate and (self.only or rng.random() < 0.6)
            data = self.mutate(data, rng) if structured else changed(data, rng)
        return data


NUMBERS = (0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"))
TEXTS = (
    "",
    "a",
    "..",
    "../x",
    "/x",
    "x" * 300,
    "\0",
    "é",
    "😀",
    "<script>",
    "$\\frac{$",
    "{}",
    "1",
)
ODD = (*NUMBERS, *TEXTS, None, True, [], {}, [[]], {"a": {}}, [0] * 50)
TOKENS = [
    b"\0",
    b"\xff",
    b"\n",
    b":",
    b",",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\\ud800",
    b"..",
    b"/",
]
TOKENS += [b"-1", b"1e999", b"NaN", b"null", b"true", b"99999999999999999999", b"#", b"=", b"1/0"]


def changed(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, inserted, removed, repeated or cut."""
    data, at = bytearray(data), rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 2, 8, 64, 1000)))
    action = rng.randrange(6)
    if action == 0 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif action == 1:
        data[at:at] = rng.choice(TOKENS)
    elif action == 2:
        del data[at:end]
    elif action == 3:
        data[at:at] = data[at:end]
    elif action == 4:
        del data[at:]
    else:
        data[at:end] = rng.randbytes(end - at)
    return bytes(data[:200_000])


def changed_value(value: object, rng: random.Random, depth: int = 0) -> object:
    """A JSON value with one part of it replaced, removed, renamed or repeated."""
    inside = depth == 0 or rng.random() < 0.85
    if isinstance(value, dict) and value and inside:
        copy, key = dict(value), rng.choice(list(value))
        action = rng.randrange(5)
        if action == 0:
            del copy[key]
        elif action == 1:
            copy[rng.choice(TEXTS)] = copy.pop(key)
        elif action == 2:
            copy[rng.choice(("extra", key))] = rng.choice(ODD)
        else:
            copy[key] = changed_value(copy[key], rng, depth + 1)
        return copy
    if isinstance(value, list) and value and inside:
        copy, at = list(value), rng.randrange(len(value))
        action = rng.randrange(4)
        if action == 0:
            del copy[at]
        elif action == 1:
            copy.insert(at, copy[at])
        else:
            copy[at] = changed_value(copy[at], rng, depth + 1)
        return copy
    if type(value) in (int, float) and rng.random() < 0.3:
        return value + rng.choice((1, -1, 0.5, 2))
    return rng.choice(ODD)


def changed_json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return changed(data, rng)
    return json.dumps(changed_value(value, rng)).encode()


def parts(data: bytes) -> tuple[dict, bytes]:
    """Header and tensors of a safetensors file; ValueError where there is none."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header, data[8 + length :]


def framed(header: object, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def changed_header(data: bytes, rng: random.Random) -> bytes:
    """A file whose header is JSON of the announced length still, with one value changed."""
    try:
        header, tensors = parts(data)
    except (ValueError, RecursionError):
        return changed(data, rng)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and metadata and rng.random() < 0.5:
        key = rng.choice(list(metadata))
        text = str(metadata[key]).encode(errors="replace")
        new = changed_json(text, rng).decode(errors="replace")
        return framed({**header, "__metadata__": {**metadata, key: new}}, tensors)
    return framed(changed_value(header, rng), tensors)


def weights(folder: Path) -> Target:
    import torch
    from comfyui_deltaconv.deltaconv import DeltaConvBlock, WeightsError, read_weights
    from comfyui_deltaconv.deltaconv.weights.file import write_weights
    from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
    from safetensors.torch import save

    torch.manual_seed(0)
    blocks = {f"blocks.{n}.attn": DeltaConvBlock(4, 3) for n in range(2)}
    own = write_weights(weights_of_blocks(blocks), folder / "own.safetensors", overwrite=True)
    state = DeltaConvBlock(4, 1).state_dict()
    other = {f"base_ema:transformer_blocks.0.conv1.{name}": t for name, t in state.items()}
    path = folder / "fuzzed.safetensors"

    def read(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            found = read_weights(path, finite=True)
            for site in found.sites:
                found.block(site)
        except WeightsError as error:
            assert len(str(error)) < 3000
            return False
        return bool(str(found))

    # safetensors 0.8 keeps an integer, 32 bytes, of each tensor above 256 bytes that it gives.
    return Target([own.read_bytes(), save(other, {"a": "b"})], read, changed_header, kept=128)


def recipe(folder: Path) -> Target:
    from comfyui_deltaconv.deltaconv.locality.recipe import RecipeError, parse_recipe

    text = "# about\nstart: 0.3\ndown.0: replace kernel=9 scales=1,1/2  # why\nup.1: keep\n"

    def read(data: bytes) -> bool:
        given, taken = data.decode(errors="replace"), False
        for sites in (None, ("down.0", "up.1", "middle")):
            try:
                found = parse_recipe(given, sites)
            except RecipeError as error:
                assert len(str(error)) < 1000
                continue
            again = parse_recipe(found.to_text())
            assert (again.blocks, again.start) == (found.blocks, found.start)
            taken = True
        return taken

    return Target([text.encode(), b"a.b: replace kernel=3\nc: replace kernel=17 scales=0.25"], read)


def states(folder: Path) -> Target:
    import torch
    from comfyui_deltaconv.deltaconv.distillation import DistillationError, checkpoint
    from safetensors import SafetensorError
    from safetensors.torch import load

    run, identity, shapes = folder / "run", {"base": "b", "recipe": {"a": 3}}, {"a.w": (2, 3)}
    names = {f"{g}.a.w": torch.ones(2, 3) for g in ("weights", "ema")}
    moments = {f"optimiser.a.w.{m}": torch.ones(2, 3) for m in ("exp_avg", "exp_avg_sq")}
    tensors = {
        **names,
        **moments,
        "optimiser.a.w.step": torch.tensor(1.0),
        "rng": torch.Generator().get_state(),
        "history": torch.zeros(1, dtype=torch.float64),
    }
    progress = checkpoint.Progress("layers", 1, 1, 1, 1, 1, 0, 1.0, {}, {"seed": 3}, ("a",), 0.2)
    path = checkpoint.save_state(run, checkpoint.State(tensors, progress), identity)

    def signed(data: bytes, rng: random.Random) -> bytes:
        """Changed, with the digest that whoever means harm would give it."""
        data = changed_header(data, rng)
        try:
            header, rest = parts(data)
            metadata = header["__metadata__"]
            metadata.pop("deltaconv.digest", "")
            digest = checkpoint._digest(load(data), metadata)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
            return data
        metadata["deltaconv.digest"] = digest
        return framed(header, rest)

    def read(data: bytes) -> bool:
        path.write_bytes(data)
        seed = checkpoint.saved_seed(run)
        assert seed is None or isinstance(seed, int)
        try:
            found = checkpoint.load_state(run, identity, shapes)
        except DistillationError as error:
            assert len(str(error)) < 2000
            return False
        assert found.progress.number == len(found.tensors["history"])
        return True

    # As for weights: safetensors keeps 32 bytes of each larger tensor.
    return Target([path.read_bytes()], read, signed, kept=128)


def downloads(folder: Path) -> Target:
    from comfyui_deltaconv.deltaconv.hub.configuration import read_configuration

    rows = [
        {"repo": "a/b", "revision": "main", "path": "c/d.safetensors"},
        {
            "repo": "a/e",
            "revision": "0" * 40,
            "path": "f.safetensors",
            "size": 1,
            "sha256": "0" * 64,
        },
    ]
    path = folder / "repositories.json"

    def read(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            entries = read_configuration(path, taken=["x.safetensors"])
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 20_000
            return False
        for entry in entries:
            target = folder / entry.file
            assert target.suffix == ".safetensors" and not target.name.startswith(".")
            assert Path(os.path.normpath(target)).parent == folder and "\\" not in entry.file
        return True

    return Target([json.dumps(rows).encode()], read, changed_json)


def report(folder: Path) -> Target:
    from comfyui_deltaconv.deltaconv.locality.document import read_report
    from comfyui_deltaconv.deltaconv.locality.text import report_text
    from locality_reports import small_report

    def read(data: bytes) -> bool:
        try:
            found = read_report(data.decode(errors="replace"))
        except ValueError as error:
            assert len(str(error)) < 1000
            return False
        text = found.to_json()
        # Now and then, because it takes longest.
        if len(data) % 16 == 0:
            assert report_text(found) and read_report(text).to_json() == text
        return True

    return Target([small_report(size=3).to_json().encode()], read, changed_json)


TARGETS = {f.__name__: f for f in (weights, recipe, states, downloads, report)}


def inputs(folder: Path) -> Target:
    """Values of every node's widgets, as far as the node goes without a model."""
    # Drawing takes most of a second, whatever the inputs: sentences take the place of plots.
    sys.modules["matplotlib"] = None
    from node_inputs import Nodes

    nodes = Nodes(folder)
    return Target(nodes.seeds, nodes.read, nodes.changed, only=True)


TARGETS["inputs"] = inputs


class Forbidden(BaseException):
    """The code under test did what no input may make it do."""


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PATHS = {"os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.remove": 1}
_PATHS |= {"os.rmdir": 1, "os.truncate": 1, "os.chmod": 1, "os.utime": 1, "shutil.rmtree": 1}
_NEVER = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
)
_NEVER += ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "ctypes.dlopen")


def confine(folder: Path) -> None:
    """From now on what writes elsewhere, starts a program, unpickles or asks a host raises."""
    root = str(folder.resolve()) + os.sep

    def watch(event, arguments):
        if event in _NEVER:
            raise Forbidden(event, arguments)
        if event == "open":
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or (flags or 0) & _WRITING
            paths = [path] if writes and not isinstance(path, int) else []
        else:
            paths = arguments[: _PATHS.get(event, 0)]
        for path in paths:
            if not os.path.abspath(os.fsdecode(path)).startswith(root):
                raise Forbidden(event, arguments)

    sys.addaudithook(watch)


def peak_memory() -> int:
    """Bytes, the most that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def fuzz(target: Target, count: int, seed: int) -> dict[str, object]:
    """Read `count` inputs; raises, naming the input, where one is not as it should be."""
    rng, taken, slowest, longest = random.Random(seed), 0, 0.0, 0
    assert target.read(target.seeds[0]), "what is whole was refused"
    for _ in range(200):
        target.read(target.input(rng))
    before = peak_memory()
    for number in range(count):
        data = target.input(rng)
        start = time.process_time()
        try:
            taken += target.read(data)
        except BaseException as error:
            raise RuntimeError(f"input {number} of seed {seed}: {data[:2000]!r}") from error
        seconds = time.process_time() - start
        slowest, longest = max(slowest, seconds), max(longest, len(data))
        if seconds > LONGEST:
            raise RuntimeError(f"input {number} took {seconds:.2f} s: {data[:2000]!r}")
    grown = peak_memory() - before
    if grown > MEMORY + 2 * longest + count * target.kept:
        raise RuntimeError(f"memory grew by {grown >> 20} MiB in {count} inputs")
    return {"inputs": count, "taken": taken, "slowest": slowest, "grown": grown}


def guided(make: Callable[[Path], Target], folder: Path, seconds: int) -> None:
    """Inputs that atheris finds by the branches that they take; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["comfyui_deltaconv"]):
        target = make(folder)
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(data)
    line = [sys.argv[0], f"-max_total_time={seconds}", "-timeout=2", "-rss_limit_mb=4096"]
    atheris.Setup([*line, f"-artifact_prefix={folder}/", str(corpus)], target.read)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("targets", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", type=int, metavar="SECONDS")
    parser.add_argument("--comfyui", type=Path, metavar="TREE")
    options = parser.parse_args()
    # A script that is run apart from its folder finds none of its neighbors.
    sys.path.append(str(Path(__file__).parent))
    import torch

    torch.set_num_threads(1)
    folder = options.folder.resolve()
    if options.comfyui:
        from comfyui_deltaconv.cli import host

        host.enter(options.comfyui, folder)
    if options.atheris:
        guided(TARGETS[options.targets[0]], folder, options.atheris)
        return
    targets = {name: TARGETS[name](folder) for name in options.targets}
    # What is imported late may write, as Python does where it compiles.
    for target in targets.values():
        for data in target.seeds:
            target.read(data)
    confine(folder)
    for name, target in targets.items():
        print(json.dumps({name: fuzz(target, options.inputs, options.seed)}), flush=True)


if __name__ == "__main__":
    main()
