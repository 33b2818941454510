"""One row: contenders are built, checked at that shape, and timed in turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ..kernels.timing import captured, extra_memory, interleaved, once, saved_for_backward
from .check import (
    forward_error,
    forward_problem,
    gradient_errors,
    gradient_problem,
    gradients,
    random_input,
    tiles_apart,
)
from .contenders import BLOCKS, CONTENDERS, Contender
from .shapes import Row

# Longer calls are not repeated: attention at 16384² takes minutes.
LONGEST_CALL = 1.0
TOO_LONG = "one call takes {:.1f} s"
# torch's operators, with which the other forms of a block are compared.
REFERENCE = "nchw"
TRAINED = (REFERENCE, "nhwc", "ours")

Calls = Mapping[str, Callable[[], object]]


@torch.no_grad()
def measure_forward(
    row: Row, batch: int, dtype: torch.dtype, device: torch.device, names, repeats: int
) -> dict:
    """Eager and graph times, peak extra memory, chosen tiles, reasons of those left out."""
    x = random_input(row, batch, dtype, device)
    calls, left_out, tiles = {}, {}, {}
    own = reference = None
    for name, contender in _built(row, dtype, device, names, left_out):
        try:
            if contender.tune:
                tiles[name] = contender.tune(x)
            if problem := _too_long(lambda run=contender.run: run(x), device):
                left_out[name] = problem
                continue
            value = contender.run(x)
            error = forward_error(contender, x, value)
            compared = reference is not None and name in BLOCKS
            apart = tiles_apart(value, reference) if compared else None
        except Exception as problem:
            left_out[name] = _sentence(problem)
            continue
        if problem := forward_problem(name, error, own, dtype, apart):
            left_out[name] = problem
            continue
        if name == REFERENCE:
            own, reference = error, value
        calls[name] = lambda run=contender.run: run(x)
    # Free the reference before measuring peak memory.
    value = reference = None
    tiles = {name: found for name, found in tiles.items() if name in calls}
    return {"tiles": tiles} | _timed(_ordered(calls, names), device, repeats, left_out)


def measure_training(
    row: Row, batch: int, dtype: torch.dtype, device: torch.device, names, repeats: int
) -> dict:
    """The same for forward and backward pass, and the bytes that autograd keeps in between."""
    x = random_input(row, batch, dtype, device).requires_grad_()
    upstream = random_input(row, batch, dtype, device, seed=1)
    calls, saved, left_out = {}, {}, {}
    own = reference = own_gradients = None
    for name, contender in _built(row, dtype, device, names, left_out):

        def call(contender=contender):
            return gradients(contender, x, upstream)

        try:
            if problem := _too_long(call, device):
                left_out[name] = problem
                continue
            value = contender.run(x).detach()
            error = forward_error(contender, x, value)
            errors = gradient_errors(CONTENDERS[name], row, batch, dtype, device)
            found = call()
            problem = forward_problem(name, error, own, dtype) or gradient_problem(
                errors, own_gradients or errors, found, reference or found, dtype
            )
            if not problem:
                owned = [x, *contender.tensors]
                saved[name] = saved_for_backward(lambda run=contender.run: run(x), owned)
        except Exception as reason:
            problem = _sentence(reason)
        if problem:
            left_out[name] = problem
            continue
        if name == REFERENCE:
            own, own_gradients, reference = error, errors, found
        calls[name] = call
    value = found = reference = None
    return {"saved": saved} | _timed(_ordered(calls, names), device, repeats, left_out)


def _built(
    row: Row, dtype: torch.dtype, device: torch.device, names, left_out: dict
) -> Iterator[tuple[str, Contender]]:
    # The reference first: its error is the others' budget.
    for name in sorted(names, key=lambda name: name != REFERENCE):
        try:
            contender = CONTENDERS[name](row, dtype, device)
        except Exception as problem:
            left_out[name] = _sentence(problem)
            continue
        yield name, contender


def _sentence(problem: Exception) -> str:
    """A contender's failure as a sentence: it must not end the others' measurement."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    return f"cannot run ({type(problem).__name__}: {problem})".split("\n")[0]


def _too_long(call: Callable[[], object], device: torch.device) -> str | None:
    seconds = once(call, device)
    if LONGEST_CALL < seconds < 10 * LONGEST_CALL:
        seconds = once(call, device)  # the first one may have compiled
    return TOO_LONG.format(seconds) if seconds > LONGEST_CALL else None


def _ordered(calls: Calls, names: Sequence[str]) -> Calls:
    return {name: calls[name] for name in names if name in calls}


def _timed(calls: Calls, device: torch.device, repeats: int, left_out: dict) -> dict:
    result = {"eager": interleaved(calls, device, repeats), "left_out": left_out}
    if device.type != "cuda":
        return result
    result["memory"] = {name: extra_memory(call, device) for name, call in calls.items()}
    replays = {}
    for name, call in calls.items():
        try:
            replays[name] = captured(call, device)
        except RuntimeError as error:
            left_out[f"{name} as a graph"] = str(error).split("\n")[0]
    result["graph"] = interleaved(replays, device, repeats)
    return result
