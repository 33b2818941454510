"""The first call of every kernel size in a fresh process: compiled, and from Triton's cache."""

import json
import os
import subprocess
import sys
import tempfile

from ..kernels.device import default_device, environment
from .report_file import ReportFile

# The first one also starts the device and imports Triton.
SIZES = (5, 3, 7, 9, 11, 13, 17)


def run(file: ReportFile) -> dict:
    """Seconds by kernel size, with an empty cache and with a full one, as one report."""
    report = file.open(environment(default_device()))
    with tempfile.TemporaryDirectory() as cache:
        for state in ("compiled", "from the cache"):
            # The second needs what the first compiles.
            if state == "compiled" and not file.wants(state="from the cache"):
                break
            file.add({"state": state, "seconds": _in_a_fresh_process(cache)})
            print(f"first call, {state}: {report['results'][-1]['seconds']}", flush=True)
    return report


def _in_a_fresh_process(cache: str) -> dict[str, float]:
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    line = [sys.executable, "-m", __spec__.name]
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints seconds by kernel size as JSON."""
    import time

    import torch

    from ..kernels.accuracy import Case, make_inputs, project

    found = {}
    for size in SIZES:
        case = Case(2, 64, 64, 640, size)
        inputs = make_inputs(case, torch.float16, default_device())
        torch.cuda.synchronize()
        start = time.monotonic()
        project(case, inputs)
        torch.cuda.synchronize()
        found[str(size)] = round(time.monotonic() - start, 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
