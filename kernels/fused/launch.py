"""One kernel at one shape: arguments by name, and direct launches past Triton's lookup."""

import inspect
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch

# What a compiled kernel's `run` takes before the kernel's own arguments.
_LAUNCHER = (
    *("gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata"),
    *("launch_enter_hook", "launch_exit_hook"),
)


class Launch:
    """A kernel with its grid, numbers and constants, called with a tuple of all tensors.

    `fields` is the NamedTuple class of that tuple; the kernel gets the fields that it names. Names
    are resolved once, here: a call by keywords costs as much as a launch. From the second call on
    the compiled kernel is launched directly, because Triton's lookup takes longer than a small
    kernel runs. This is safe: the plan fixes everything that selects a compilation, and tensors are
    aligned, of its dtypes, on its device. Once `ready`, tensors may be given as addresses.
    """

    def __init__(
        self,
        kernel,
        programs: int,
        fields: Any,
        numbers: Mapping[str, int | float],
        constants: Mapping[str, int | bool],
        *,
        warps: int = 4,
        stages: int = 1,
    ):
        self.kernel, self.programs, self.fields = kernel, programs, fields._fields
        names = list(kernel.arg_names)
        self.tensors = tuple(n for n in names if n not in numbers and n not in constants)
        # In the kernel's order: tensors, numbers, constants.
        self.numbers = {name: numbers[name] for name in names if name in numbers}
        self.constants = {name: constants[name] for name in names if name in constants}
        ordered = [*self.tensors, *self.numbers, *self.constants]
        given = [*numbers, *constants]
        # Each name is given once: a tensor that is also a number would never be read.
        wrong = set(given) - set(names) or set(given) & set(fields._fields)
        if names != ordered or wrong or not set(self.tensors) <= set(fields._fields):
            raise TypeError(
                f"Expected the arguments {names} of {kernel.__name__}: tensors, then numbers, then "
                f"constants; got tensors {[*fields._fields]}, numbers {[*numbers]} and constants "
                f"{[*constants]}."
            )
        self._pick = itemgetter(*[fields._fields.index(name) for name in self.tensors])
        self.options = {"num_warps": warps, "num_stages": stages}
        self.tail = (*self.numbers.values(), *self.constants.values())
        self._direct: Callable | None = None
        # What Triton compiled, once it was called; None also in the interpreter.
        self.compiled: Any = None
        self._probed = False

    @property
    def ready(self) -> bool:
        """Whether it launches directly, and so takes addresses."""
        return self._direct is not None

    def __call__(self, tensors: tuple[torch.Tensor | int | None, ...]) -> None:
        if self._direct is not None:
            self._direct(tensors)
            return
        picked = self._pick(tensors)
        compiled = self.kernel[(self.programs, 1, 1)](*picked, *self.tail, **self.options)
        if not self._probed:
            self._probed = True
            # The interpreter returns nothing.
            if compiled is not None:
                self.compiled = compiled
                self._direct = self._past_lookup(compiled, picked[0].device)

    def _past_lookup(self, compiled, device: torch.device) -> Callable | None:
        """A function of all tensors that launches on the device's current stream.

        None if this Triton's launcher has an unknown signature: then the public call is used.
        """
        if not takes_known_arguments(compiled):
            return None
        from triton.runtime import driver

        # Any: Triton's base class of drivers has no streams.
        active: Any = driver.active
        stream_of, index = active.get_current_stream, device.index or 0
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        programs, pick, tail = self.programs, self._pick, self.tail

        def launch(tensors):
            # No launch metadata and no hooks: only Triton's profiler uses them.
            start = (programs, 1, 1, stream_of(index), function, metadata, None, None, None)
            run(*start, *pick(tensors), *tail)

        return launch


def takes_known_arguments(compiled) -> bool:
    """Whether a compiled kernel is launched as Triton 3.6 and 3.8 do it."""
    if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
        return False
    return is_known_launcher(compiled.run)


def is_known_launcher(launcher: Callable) -> bool:
    """Whether it takes grid, stream, function, two metadata, two hooks, then the arguments.

    Older launchers name the first five and take the rest as `*args`.
    """
    try:
        parameters = inspect.signature(launcher).parameters.values()
    except (TypeError, ValueError):
        return False
    fixed = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    return fixed in (_LAUNCHER[:5], _LAUNCHER)
