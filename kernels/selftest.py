"""`python -m comfyui_deltaconv.kernels.selftest`: may the ops be trusted on this device?

Every dtype and kernel size is compared with the float64 definition and allowed what torch's own
operators lose in that dtype: first forward, which is all that drawing needs, then backward. Ends
within its time limit and says what it did not get to; what is compiled already takes no time again.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from . import dispatch
from .accuracy import Case, forward_errors, gradient_errors, make_inputs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIRECTIONS = ("forward", "backward")
KERNEL_SIZES = (3, 5, 7, 9, 11, 13, 15, 17)
SECONDS = 30.0


class Verdict(NamedTuple):
    """One dtype, kernel size and direction; `trusted` None: there was no time for it."""

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

    `progress(done, total)` is called behind each and may raise to stop.
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


def _verdict(device: torch.device, dtype: torch.dtype, size: int, direction: str) -> Verdict:
    # Ragged on purpose: odd sides, two images, a row of tiles that is not full.
    gate = "sigmoid" if size in (5, 13) else "scaled"
    case = Case(2, 23, 37, 64, size, gate=gate)
    implementation = ""
    try:
        # Nodes run in inference mode, where no gradient can be recorded.
        with torch.inference_mode(False), torch.enable_grad():
            if direction == "forward":
                errors = forward_errors(case, dtype, device)
            else:
                errors = gradient_errors(case._replace(batch=1, height=11), dtype, device)
        implementation = implementation_of(case, dtype, device)
    except Exception as error:
        # Whatever a driver or a compiler raises is the user's answer, not a crash.
        reason = f"{type(error).__name__}: {error}"
        return Verdict(dtype, size, direction, implementation, False, reason)
    bad = [
        f"{name} is off by {ours.worst:.1e}, torch's own operators by {own.worst:.1e}"
        for name, ours, own in errors
        if not ours.within(own, dtype)
    ]
    return Verdict(dtype, size, direction, implementation, not bad, "; ".join(bad))


def report(verdicts: Sequence[Verdict]) -> str:
    """A grid of what may be trusted, a reason for each that may not, and what to do."""
    rows: dict[str, dict[int, Verdict]] = {}
    for verdict in verdicts:
        row = rows.setdefault(f"{_name(verdict.dtype)} {verdict.direction}", {})
        row[verdict.kernel_size] = verdict
    sizes = sorted({verdict.kernel_size for verdict in verdicts})
    word = {True: "yes", False: "NO", None: "?"}
    lines = ["may be trusted".ljust(18) + "".join(f"{f'k={size}':>6}" for size in sizes)]
    for name, row in rows.items():
        lines.append(name.ljust(18) + "".join(f"{word[row[size].trusted]:>6}" for size in sizes))
    ran = dict.fromkeys(verdict.implementation for verdict in verdicts if verdict.implementation)
    lines += ["", f"What ran: {' and '.join(ran) or 'nothing'}. A ? had no time."]
    lines += ["Drawing needs forward alone, distillation both."]
    wrong = [verdict for verdict in verdicts if verdict.trusted is False]
    lines += map(str, wrong)
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
    inputs = make_inputs(case._replace(batch=1), dtype, device)
    request = dispatch.request_of(inputs[1], inputs[6:], case.scales)
    return "triton" if dispatch.uses_triton(request, dispatch.forced()) else "torch"


def default_device() -> torch.device:
    """The accelerator that torch finds, or the CPU."""
    for name in ("cuda", "xpu", "mps"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return torch.device(name)
    return torch.device("cpu")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="selftest", description=__doc__)
    parser.add_argument("--device", default=None, help="default: the GPU, or the CPU without one")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args(argv)
    device = torch.device(options.device) if options.device else default_device()
    print(f"ΔConv self-test on {device_name(device)}, torch {torch.__version__}")
    wrong = 0
    for verdict in self_test(device, options.seconds):
        wrong += verdict.trusted is False
        print(verdict, flush=True)
    print("Some results are wrong: set DELTACONV_KERNELS=torch." if wrong else "No wrong results.")
    return 1 if wrong else 0


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    module = getattr(torch, device.type, None)
    if device.type in ("cuda", "xpu"):
        return module.get_device_name(device)
    return device.type.upper()


if __name__ == "__main__":
    sys.exit(main())
