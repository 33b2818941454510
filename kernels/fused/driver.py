"""Launches by the CUDA driver's own call: arguments are written in place, nothing is looked up."""

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

# Bytes of an argument in a kernel's signature; pointers start with "*".
_SIZES = {"i32": 4, "fp32": 4, "i64": 8}
_POINTER = 8


class Library(NamedTuple):
    """The two functions of the driver that are needed."""

    launch: Callable[..., int]
    parameter: Callable[..., int]


class Config(ctypes.Structure):
    """`CUlaunchConfig` of cuda.h."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gridX", "gridY", "gridZ")),
        *((name, ctypes.c_uint) for name in ("blockX", "blockY", "blockZ", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


@cache
def cuda_library() -> Library | None:
    """The driver's functions; None without a driver that has both (CUDA 12.4 and later)."""
    if torch.version.hip is not None:
        return None
    try:
        # PyDLL keeps the GIL: a launch takes less time than giving it away.
        library = ctypes.PyDLL("libcuda.so.1")
        launch, parameter = library.cuLaunchKernelEx, library.cuFuncGetParamInfo
    except (OSError, AttributeError):
        return None
    launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    sizes = ctypes.POINTER(ctypes.c_size_t)
    parameter.argtypes = (ctypes.c_void_p, ctypes.c_size_t, sizes, sizes)
    return Library(launch, parameter)


def parameter_sizes(library: Library, function: int) -> list[int]:
    """Bytes of each parameter that a loaded kernel takes, as the driver knows them."""
    sizes, offset, size = [], ctypes.c_size_t(), ctypes.c_size_t()
    while library.parameter(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == 0:
        sizes.append(size.value)
    return sizes


class DirectLaunch(NamedTuple):
    """One compiled kernel at one grid: what `Library.launch` takes, on `config.stream`.

    Its tensors' addresses are read from cells that the caller fills in.
    """

    arguments: tuple[int | None, ...]
    config: Config
    # What the arguments point to, and the kernel.
    kept: tuple


def direct_launch(
    library: Library, compiled: Any, launch: Any, cells: Any, places: Mapping[str, int]
) -> DirectLaunch | None:
    """A direct form of `launch`, which was compiled to `compiled`; None where anything is unknown.

    `cells` has an address for every field of the tuple of all tensors, `places` their order.
    Unknown are a cluster, a cooperative grid, memory that Triton allocates for each launch, and
    parameters that are not those of the signature plus at most two pointers for such memory.
    """
    metadata = compiled.metadata
    usual = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
    usual |= {"global_scratch_size": 0, "profile_scratch_size": 0}
    if any(getattr(metadata, name, value) != value for name, value in usual.items()):
        return None
    signature = getattr(compiled.src, "signature", None)
    if not isinstance(signature, Mapping) or [*signature] != [*launch.kernel.arg_names]:
        return None
    taken = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    if not all(kind in _SIZES or kind.startswith("*") for kind in taken.values()):
        return None
    expected = [_SIZES.get(kind, _POINTER) for kind in taken.values()]
    sizes = parameter_sizes(library, compiled.function)
    surplus = sizes[len(expected) :]
    if sizes[: len(expected)] != expected or len(surplus) > 2 or set(surplus) - {_POINTER}:
        return None
    addresses, kept = [], [compiled, cells]
    for name, kind in taken.items():
        if kind.startswith("*"):
            addresses.append(ctypes.addressof(cells) + _POINTER * places[name])
            continue
        number = launch.numbers[name]
        held = (ctypes.c_float if kind == "fp32" else ctypes.c_int64)(number)
        kept.append(held)
        addresses.append(ctypes.addressof(held))
    nothing = ctypes.c_uint64(0)
    kept.append(nothing)
    addresses += [ctypes.addressof(nothing)] * len(surplus)
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    threads = 32 * metadata.num_warps
    config = Config(launch.programs, 1, 1, threads, 1, 1, metadata.shared, None, None, 0)
    first, last = ctypes.addressof(config), ctypes.addressof(parameters)
    arguments = (first, compiled.function, last, None)
    return DirectLaunch(arguments, config, (parameters, *kept))
