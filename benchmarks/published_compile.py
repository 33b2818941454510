"""`python -m comfyui_deltaconv.benchmarks.published_compile`: compile the published style.

The full level's convolution at every tile, for GPUs that are not here; options and output are
those of `kernels.compile_ahead`.
"""

import sys

from ..kernels import compile_ahead
from ..kernels.accuracy import Case
from .published_kernels import TILES, Launch, plan


def launches(case: Case, dtype, target: str) -> list[Launch]:
    """One launch per tile, whatever the dtype and the target."""
    shape = (case.batch, case.height, case.width, case.dim // 2)
    return [plan(shape, case.kernel_size, tile) for tile in TILES]


if __name__ == "__main__":
    sys.exit(compile_ahead.main(launches_of=launches))
