"""The convolution on tensor cores against the one in registers: whole blocks, and launch by launch.

Launches are timed alone, by replay on a GPU, with every tile that might be the best one on the
first shapes. A tile whose result is off is not timed.
"""

from collections.abc import Callable, Sequence

import torch

from ..kernels.accuracy import Case, make_inputs
from ..kernels.device import environment
from ..kernels.timing import captured, interleaved, synchronize
from .check import random_input, tiles_apart
from .report_file import ReportFile
from .shapes import ROWS, SCALES, Row
from .trial import measure_forward

NAMES = ("nchw", "ours", "bands")
# In order of value: the largest kernels and maps, on which every tile is tried, then small maps.
TUNED = (ROWS[2], ROWS[7], ROWS[9])
WHERE = (*TUNED, ROWS[6], ROWS[11], ROWS[1], ROWS[0], ROWS[10], ROWS[8], ROWS[4], ROWS[5], ROWS[3])
# Two correct results are half a unit of their dtype apart, in the root mean square of a tile.
APART = 2.0


def run(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    repeats: int,
    file: ReportFile,
    rows: Sequence[Row] = WHERE,
) -> dict:
    """A result per row, as one JSON-ready report; prints and writes it as it goes."""
    about = {"dtype": str(dtype).removeprefix("torch."), "batch": batch, "repeats": repeats}
    report = file.open(environment(device) | about)
    for row in rows:
        if file.wants(**row._asdict()):
            found = measure_forward(row, batch, dtype, device, NAMES, repeats)
            launches = _launches(row, batch, dtype, device, repeats, row in TUNED)
            file.add(row._asdict() | found | {"launches": launches})
            _print(report["results"][-1])
    return report


@torch.no_grad()
def _launches(
    row: Row, batch: int, dtype: torch.dtype, device: torch.device, repeats: int, tuned: bool
) -> dict:
    """Plan → seconds by launch, and how far its result is from that of rows.

    Plans are `rows` and one per tile of bands, by its name.
    """
    # Imported here: only what runs them needs Triton.
    from ..kernels.fused import forward, plan, plan_bands
    from ..kernels.fused.workspace import Tensors

    x = random_input(row, batch, dtype, device).unflatten(1, (row.side, row.side))
    u = x[..., : row.dim // 2].contiguous()
    case = Case(1, 1, 1, row.dim, row.kernel_size, SCALES, row.gate)
    _, _, *rest = make_inputs(case, dtype, device)
    linear, weights = rest[:4], rest[4:]
    shape = forward.shape_of(u, weights, SCALES, row.gate)
    plans = {"rows": plan.plan_forward(shape, row.dim, dtype)}
    product = plan.projection_tile(batch, row.tokens, row.dim, plan.shared_memory(device))
    own = plan_bands.band_tile(shape.sizes[0], -(-row.side // plan_bands.step_of(row.kernel_size)))
    for tile in dict.fromkeys((own, *(plan_bands.TRIED if tuned else ()))):
        named = ", ".join(f"{value} {field}" for field, value in tile._asdict().items())
        plans[f"bands: {named}"] = plan_bands.plan_bands(shape, row.dim, product, tile)

    report, calls, reference = {}, {}, None
    for name, planned in plans.items():
        result, memory = torch.empty_like(x), planned.memory(device)[0]
        buffers = [buffer.of(memory) for buffer in planned.buffers.values()]
        three = forward.three(weights)
        tensors = Tensors(u, x, *three, None, None, None, *linear, result, *buffers)
        try:
            for launch in planned.launches:
                launch(tensors)
            synchronize(device)
        except Exception as problem:
            # Compilers and drivers raise different errors for a tile that is too large.
            report[name] = {"failed": f"{type(problem).__name__}: {problem}".split("\n")[0]}
            continue
        value = result.flatten(1, 2)
        reference = value if reference is None else reference
        apart = tiles_apart(value, reference)
        report[name] = {"apart": apart}
        # Written so that NaN fails.
        if not apart <= APART * torch.finfo(dtype).eps:
            report[name]["failed"] = "WRONG RESULT, not timed"
            continue
        for launch in planned.launches:
            calls[name, launch.kernel.__name__] = _bound(launch, tensors, device)
    timings = interleaved(calls, device, repeats)
    for (name, kernel), timing in timings.items():
        report[name].setdefault("seconds", {})[kernel] = timing
    return report


def _bound(launch, tensors: tuple, device: torch.device) -> Callable[[], object]:
    def call():
        launch(tensors)

    return captured(call, device) if device.type == "cuda" else call


def _print(entry: dict) -> None:
    print(f"{entry['name']}, C={entry['dim']} k={entry['kernel_size']} H=W={entry['side']}:")
    for way in ("eager", "graph"):
        times = {name: each["median"] * 1e6 for name, each in entry.get(way, {}).items()}
        if times:
            print(f"    {way}: " + "; ".join(f"{name} {us:.1f}" for name, us in times.items()))
    for name, found in entry["launches"].items():
        times = {each: t["median"] * 1e6 for each, t in found.get("seconds", {}).items()}
        line = "; ".join(f"{each} {us:.1f}" for each, us in times.items())
        print(f"    {name}: {found.get('failed') or line}", flush=True)
    for name, reason in entry["left_out"].items():
        print(f"    {name}: {reason}", flush=True)
