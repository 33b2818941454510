"""May the ops be trusted on this device?

Every dtype and kernel size is compared with the float64 definition and allowed what torch's own
operators lose in that dtype, on a ragged map with depthwise biases and on one that is compiled as
real models' are: first forward, which is all that drawing needs, then backward. Ends within its
time limit and says what it did not get to; what is compiled already takes no time again.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from . import backend
from .accuracy import Case, forward_errors, gradient_errors

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIRECTIONS = ("forward", "backward")
# By kernel size, what Triton compiles for real models: their channels, maps that pool evenly, both
# sizes of every tile. As many programs as the models' maps have, which selects the tiles, on maps
# narrow enough that the definition in float64 stays quick.
REAL = {
    # SDXL at 2048²: the widest product, 128 × 128.
    3: Case(52, 6, 8, 1280, 3),
    # SD1.5's level 2 as it is: small tiles of 32 channels.
    5: Case(2, 16, 16, 1280, 5),
    # SD1.5's level 0, with a third scale.
    7: Case(3, 72, 6, 320, 7, (1.0, 0.5, 1 / 3)),
    # SDXL's level 2: large tiles of 32 channels.
    9: Case(2, 56, 4, 1280, 9),
    # SD1.5's level 0: large tiles of 16 channels, the narrow product.
    11: Case(3, 72, 4, 320, 11),
    13: Case(2, 64, 2, 1152, 13, gate="sigmoid"),
    15: Case(3, 72, 2, 640, 15),
    17: Case(3, 72, 2, 320, 17),
}
# What users distill themselves: HunyuanDiT's odd width, Anima's, the widest of Wan. They
# compile the same programs; their sums are longer.
WIDE = {
    11: (Case(1, 64, 4, 1408, 11), Case(1, 64, 4, 2048, 11), Case(1, 64, 4, 5120, 11)),
}
KERNEL_SIZES = tuple(REAL)
SECONDS = 30.0


class Verdict(NamedTuple):
    """One dtype, kernel size and direction; `trusted` is None if there was no time for it."""

    dtype: torch.dtype
    kernel_size: int
    direction: str
    implementation: str
    trusted: bool | None
    reason: str

    def __str__(self) -> str:
        word = {True: "ok", False: "DO NOT TRUST", None: "not tested"}[self.trusted]
        name = f"{_name(self.dtype):<9} k={self.kernel_size:<3} {self.direction:<9}"
        line = f"{name} {self.implementation:<7} {word}"
        return f"{line}: {self.reason}" if self.reason else line


def self_test(
    device: torch.device | str,
    seconds: float = SECONDS,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Verdict]:
    """A verdict per direction, dtype and kernel size, as they come.

    `progress(done, total)` is called after each and may raise to stop.
    """
    device = torch.device(device)
    deadline = time.monotonic() + seconds
    plan = [(dtype, size, way) for way in DIRECTIONS for dtype in DTYPES for size in KERNEL_SIZES]
    for done, (dtype, size, way) in enumerate(plan):
        if time.monotonic() > deadline:
            yield Verdict(dtype, size, way, "", None, f"the {seconds:.0f} s were over")
        else:
            yield _verdict(device, dtype, size, way)
        if progress is not None:
            progress(done + 1, len(plan))


def cases(size: int, device: torch.device) -> tuple[Case, ...]:
    """A ragged map (odd sides, partial tiles) and real ones, with different gates."""
    real, wide = REAL[size], WIDE.get(size, ())
    if device.type == "cpu":
        # torch compiles nothing per shape: fewer channels test as much.
        real, wide = real._replace(dim=64), ()
    other = "scaled" if real.gate == "sigmoid" else "sigmoid"
    # Blocks of the authors' first release have biases: over the sizes, test every subset of scales.
    biased = ((0, 1), (1,), (0,))[size // 2 % 3]
    return Case(2, 23, 37, 64, size, gate=other, biased=biased), real, *wide


def _verdict(device: torch.device, dtype: torch.dtype, size: int, direction: str) -> Verdict:
    ragged, *real = cases(size, device)
    if direction == "backward":
        ragged = ragged._replace(batch=1, height=11)
    measure = forward_errors if direction == "forward" else gradient_errors
    ran, bad = [], []
    for case in (ragged, *real):
        shape = f"at {list(case[:4])}, {case.gate}"
        try:
            # Nodes run in inference mode, where no gradient can be recorded.
            with torch.inference_mode(False), torch.enable_grad():
                errors = measure(case, dtype, device)
            ran.append(implementation_of(case, dtype, device))
        except Exception as error:
            # Report whatever a driver or compiler raises instead of crashing.
            bad.append(f"{type(error).__name__}: {error} ({shape})")
            continue
        bad += [
            f"{name} is off by {ours.worst:.1e}, torch's own operators by {own.worst:.1e} {shape}"
            for name, ours, own in errors
            if not ours.within(own, dtype)
        ]
    implementation = " and ".join(dict.fromkeys(ran))
    return Verdict(dtype, size, direction, implementation, not bad, "; ".join(bad))


def report(verdicts: Sequence[Verdict]) -> str:
    """Markdown: a table of what may be trusted, a reason for each that may not, and what to do."""
    rows: dict[str, dict[int, Verdict]] = {}
    for verdict in verdicts:
        row = rows.setdefault(f"{_name(verdict.dtype)} {verdict.direction}", {})
        row[verdict.kernel_size] = verdict
    sizes = sorted({verdict.kernel_size for verdict in verdicts})
    word = {True: "yes", False: "NO", None: "?"}
    widths = 18, *(max(6, len(f"k={size}")) for size in sizes)

    def line(first: str, cells: Iterable[str]) -> str:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        return f"| {first.ljust(widths[0])} | {' | '.join(padded)} |"

    lines = [line("may be trusted", (f"k={size}" for size in sizes))]
    lines += [line("-" * widths[0], ("-" * (width - 1) + ":" for width in widths[1:]))]
    for name, row in rows.items():
        lines.append(line(name, (word[row[size].trusted] for size in sizes)))
    ran = dict.fromkeys(verdict.implementation for verdict in verdicts if verdict.implementation)
    lines += ["", f"What ran: {' and '.join(ran) or 'nothing'}. A ? had no time."]
    lines += ["Drawing needs forward alone, distillation both.", ""]
    wrong = [verdict for verdict in verdicts if verdict.trusted is False]
    lines += [f"- {verdict}" for verdict in wrong] + ([""] if wrong else [])
    return "\n".join([*lines, _advice(wrong, sum(v.trusted is None for v in verdicts))])


def _advice(wrong: Sequence[Verdict], untested: int) -> str:
    if any(verdict.implementation != "torch" for verdict in wrong):
        return (
            "Some results are wrong: start ComfyUI with the environment variable "
            "DELTACONV_KERNELS=torch, and test again."
        )
    if wrong:
        return (
            "torch's own operators are wrong on this device: update torch or the driver, or run "
            "the model in another dtype."
        )
    rest = f"; {untested} were not tested, give it more seconds" if untested else ""
    return f"No wrong results{rest}."


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def implementation_of(case: Case, dtype: torch.dtype, device: torch.device | str) -> str:
    """`triton` or `torch`: what the public ops run at this case."""
    # A tensor's device has its number, which the plain name lacks.
    device = torch.empty(0, device=device).device
    sizes = (case.height, case.width, case.dim // 2, case.kernel_size)
    request = backend.Request(device, dtype, *sizes, case.scales)
    return "triton" if backend.uses_triton(request, backend.forced()) else "torch"
