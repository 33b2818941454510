"""Whatever lies in a folder of states, looking for one to go on from takes no second."""

from functools import partial

import pytest
from comfyui_deltaconv.deltaconv.distillation import DistillationError
from comfyui_deltaconv.deltaconv.distillation.checkpoint import load_state, saved_seed
from hostile_files import LINUX, QUICK, REFUSED, allowance, framed, readings, specials
from safetensors.torch import save

# What a thread of its own does with every file: look for the seed, then for the state.
READER = """
from comfyui_deltaconv.deltaconv.distillation import DistillationError
from comfyui_deltaconv.deltaconv.distillation.checkpoint import load_state, saved_seed
REFUSED = DistillationError

def read_one(path):
    saved_seed(path.parent)
    return str(load_state(path.parent, {}, {}))
"""
NAME = "state-00000001.safetensors"


def stated(metadata, tensors=()):
    """A file that calls itself a state."""
    return save(dict(tensors), {"deltaconv.state": "2", "deltaconv.digest": "", **metadata})


def of_dtype(dtype, size):
    entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}
    return framed({"__metadata__": {"deltaconv.state": "2"}, "weights.a": entry}, size)


OF_STATES = {
    "no digest": lambda: stated({"deltaconv.identity": "{}", "deltaconv.progress": "{}"}),
    "a deep progress": lambda: stated({"deltaconv.progress": "[" * 2_000_000}),
    "a deep identity": lambda: stated({"deltaconv.identity": '{"a":' * 100_000}),
    "a long progress": lambda: stated({"deltaconv.progress": "[" + "[]," * 1_000_000 + "[]]"}),
    "digits": lambda: stated({"deltaconv.progress": '{"settings":{"seed":' + "9" * 10**6 + "}}"}),
    **{
        f"tensors of {dtype}": partial(of_dtype, dtype, size)
        for dtype, size in {"F8_E8M0": 8, "F4": 4, "BOOL": 8, "C64": 64, "U64": 64}.items()
    },
}


@LINUX
def test_reading_stays_small_whatever_the_file(tmp_path):
    paths = {}
    # Headers are read as those of weight files are: these stand for all.
    named = [*(QUICK.keys() - {"100 MB of metadata"}), "pickle", "open lists", "wide characters"]
    named += ["140 000 tensors", "training too deep"]
    for name, content in {**{name: REFUSED[name] for name in named}, **OF_STATES}.items():
        paths[name] = tmp_path / name / NAME
        paths[name].parent.mkdir()
        paths[name].write_bytes(content())
    for name, path in specials(tmp_path).items():
        paths[name] = tmp_path / f"{name} as a state" / NAME
        paths[name].parent.mkdir()
        path.rename(paths[name])
    problems = []
    for (name, path), found in zip(paths.items(), readings(paths.values(), READER), strict=True):
        what, message, seconds, grown = found
        print(f"{name}: {what}, {seconds:.3f} s, {grown >> 20} MiB; {message[:160]}")
        if what != "refused" or seconds > 1 or grown > allowance(path) or len(message) > 1000:
            problems.append(f"{name}: {found}")
    assert not problems, "\n".join(problems)


def test_a_state_says_no_number_that_python_cannot_take(tmp_path):
    (tmp_path / NAME).write_bytes(OF_STATES["digits"]())
    assert saved_seed(tmp_path) is None
    with pytest.raises(DistillationError, match="1 damaged"):
        load_state(tmp_path, {}, {})
