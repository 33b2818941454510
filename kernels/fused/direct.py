"""Passes whose launches are written once: a call fills in addresses and launches them."""

import ctypes
from collections.abc import Callable
from struct import Struct
from typing import Any

import torch

from .backward import made_gradients
from .driver import DirectLaunch, Library, cuda_library, direct_launch
from .forward import shape_of, three, three_biases
from .plan import plan_forward
from .plan_gradients import All, Backward
from .shape import Forward
from .workspace import Tensors, Workspace

# Kernels are compiled for addresses that are multiples of it.
ALIGNMENT = 16
_PLACES = {name: place for place, name in enumerate(Tensors._fields)}
# The result and the working memory are the last addresses; u and x the first.
_MADE = Struct(f"{1 + len(Workspace._fields)}Q")
_MADE_START = 8 * _PLACES["result"]


class DirectForward:
    """The launches of a forward pass of one shape and one set of weights, for one thread.

    A call takes u and x, contiguous and aligned, of the shape and dtype that it was made for, and
    returns the result. The weights are those of `direct_forward` and must still be alive.
    """

    def __init__(
        self,
        library: Library,
        plan: Forward,
        cells: ctypes.Array,
        launches: list[DirectLaunch],
        device: torch.device,
        dtype: torch.dtype,
        stream_of: Callable[[int], int],
    ):
        self._launch, self._cells, self._launches = library.launch, cells, launches
        self._arguments = [launch.arguments for launch in launches]
        self._starts, self._size = plan.starts, plan.size
        self._dtype, self._device = dtype, device
        self._stream_of, self._index = stream_of, device.index or 0
        self._stream: int | None = None

    def __call__(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C].

        Raises RuntimeError with the driver's number if it refuses a launch.
        """
        cells, launch = self._cells, self._launch
        memory = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        result = torch.empty_like(x, dtype=self._dtype)
        cells[0], cells[1], start = u.data_ptr(), x.data_ptr(), memory.data_ptr()
        made = [start + offset for offset in self._starts]
        _MADE.pack_into(cells, _MADE_START, result.data_ptr(), *made)
        stream = self._stream_of(self._index)
        if stream != self._stream:
            self._stream = stream
            for each in self._launches:
                each.config.stream = stream
        for arguments in self._arguments:
            if error := launch(*arguments):
                raise RuntimeError(f"Expected a launch to be accepted, got the error {error}.")
        return result


def direct_forward(
    x: torch.Tensor,
    u: torch.Tensor,
    weights,
    scales,
    gate: str,
    projections,
    biases,
    convolution: str = "rows",
) -> DirectForward | None:
    """A direct form of `forward.pyramid_projection` for these weights and this shape, or None.

    None before its kernels were compiled by a call, where the last product is the library's, where
    a weight is not aligned, and where the driver or Triton's kernels are not as expected.
    """
    library = cuda_library()
    if library is None:
        return None
    shape = shape_of(u, weights, scales, gate, biases, convolution)
    plan = plan_forward(shape, x.shape[3], x.dtype)
    if plan.project is None or not all(launch.compiled for launch in plan.launches):
        return None
    given = (*three(weights), *three_biases(biases), *projections)
    if not all(usable(tensor) for tensor in given if tensor is not None):
        return None
    cells = (ctypes.c_uint64 * len(_PLACES))()
    for place, tensor in enumerate(given, start=2):
        cells[place] = 0 if tensor is None else tensor.data_ptr()
    launches = []
    for launch in plan.launches:
        direct = direct_launch(library, launch.compiled, launch, cells, _PLACES)
        if direct is None:
            return None
        launches.append(direct)
    from triton.runtime import driver

    # Any: Triton's base class of drivers has no streams.
    active: Any = driver.active
    stream_of = active.get_current_stream
    return DirectForward(library, plan, cells, launches, u.device, u.dtype, stream_of)


class DirectBackward:
    """The launches of a backward pass of one shape, for one thread.

    A call takes what `backward.made_gradients` does, contiguous and aligned, of the shape and
    dtypes that it was made for.
    """

    def __init__(
        self,
        library: Library,
        planned: Backward,
        cells: ctypes.Array,
        slots: list[tuple[int, int]],
        launches: list[DirectLaunch],
        stream_of: Callable[[int], int],
        index: int,
    ):
        self._launch, self._planned, self._cells = library.launch, planned, cells
        self._slots, self._launches = slots, launches
        self._arguments = [launch.arguments for launch in launches]
        self._starts = [buffer.start for buffer in planned.buffers.values()]
        self._fill = Struct(f"{len(slots)}Q").pack_into
        self._stream_of, self._index = stream_of, index
        self._stream: int | None = None

    def __call__(self, *tensors) -> list[torch.Tensor]:
        return made_gradients(self._planned, tensors, self._run)

    def _run(self, given: tuple, memory: torch.Tensor) -> None:
        places = [0 if tensor is None else tensor.data_ptr() for tensor in given]
        start = memory.data_ptr()
        places += [start + offset for offset in self._starts]
        self._fill(self._cells, 0, *[places[place] + offset for place, offset in self._slots])
        stream, launch = self._stream_of(self._index), self._launch
        if stream != self._stream:
            self._stream = stream
            for each in self._launches:
                each.config.stream = stream
        for arguments in self._arguments:
            if error := launch(*arguments):
                raise RuntimeError(f"Expected a launch to be accepted, got the error {error}.")


def direct_backward(planned: Backward, device: torch.device) -> DirectBackward | None:
    """A direct form of the plan's launches; None where `direct_forward` is."""
    library = cuda_library()
    if library is None or not all(step.launch.compiled for step in planned.steps):
        return None
    # A cell for every tensor, and every part of one, that any launch takes.
    numbers: dict[tuple[str, int], int] = {}
    for step in planned.steps:
        for slot in step.slots:
            numbers.setdefault(slot, len(numbers))
    cells = (ctypes.c_uint64 * len(numbers))()
    launches = []
    for launch, slots in planned.steps:
        taken = dict(zip(launch.fields, slots, strict=True))
        places = {name: numbers[slot] for name, slot in taken.items()}
        direct = direct_launch(library, launch.compiled, launch, cells, places)
        if direct is None:
            return None
        launches.append(direct)
    from triton.runtime import driver

    # Any: Triton's base class of drivers has no streams.
    active: Any = driver.active
    places = [(All._fields.index(name), offset) for name, offset in numbers]
    stream_of, index = active.get_current_stream, device.index or 0
    return DirectBackward(library, planned, cells, places, launches, stream_of, index)


def usable(tensor: torch.Tensor) -> bool:
    """Whether a kernel can read it where it is."""
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
