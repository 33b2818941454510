"""Whatever a file is, reading it takes no second, and no more memory than twice its size."""

from hostile_files import (
    LINUX,
    MEBI,
    QUICK,
    READ,
    REFUSED,
    allowance,
    full_checkpoint,
    readings,
    specials,
)

SECONDS = 1.0
# Of one read in a process that has just begun; 3 ms where it was measured.
QUICK_SECONDS = 0.05
LONGEST_MESSAGE = 1500
READER = """
from comfyui_deltaconv.deltaconv import WeightsError, read_weights
REFUSED = WeightsError

def read_one(path):
    return f"{len(read_weights(path).sites)} sites"
"""


@LINUX
def test_reading_stays_small_whatever_the_file(tmp_path):
    paths = {}
    for name, content in {**REFUSED, **READ}.items():
        paths[name] = tmp_path / f"{name}.safetensors"
        paths[name].write_bytes(content())
    paths |= specials(tmp_path)
    paths["checkpoint"] = full_checkpoint(tmp_path)
    problems = []
    for (name, path), found in zip(paths.items(), readings(paths.values(), READER), strict=True):
        what, message, seconds, grown = found
        size = path.stat().st_size if path.is_file() else 0
        line = f"{name}: {what}, {seconds:.2f} s, {grown / MEBI:.0f} MiB of {size / MEBI:.1f} MiB"
        print(f"{line}; {message[:160]}")
        if name in QUICK and seconds > QUICK_SECONDS:
            problems.append(line)
        if what != ("read" if name in (*READ, "checkpoint") else "refused"):
            problems.append(f"{line}: {message}")
        if seconds > SECONDS or grown > allowance(path) or len(message) > LONGEST_MESSAGE:
            problems.append(f"{line}; {len(message)} characters")
    assert not problems, "\n".join(problems)
