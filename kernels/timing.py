"""Timing: interleaved repeats, medians with their spread, eager and as a replayed CUDA graph."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

# A sample repeats a call for about this long, far above the clock's resolution.
SAMPLE_SECONDS = 0.003


def synchronize(device: torch.device) -> None:
    """Wait for this device, current or not; a no-op on a CPU."""
    if device.type == "mps":
        # There is only one; its function takes no argument.
        torch.mps.synchronize()
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def once(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Mean seconds of `times` successive calls, by the device's clock if it has one."""
    if device.type != "cuda":
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / times
    # Events and Triton's launches use the current device.
    with torch.cuda.device(device):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        stop.record()
        stop.synchronize()
    return start.elapsed_time(stop) / 1000 / times


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, dict[str, float]]:
    """Name → median and quartiles in seconds; every repeat runs all calls in turn."""
    times = {}
    for name, call in calls.items():
        once(call, device)  # compiles and fills caches
        times[name] = max(1, min(200, round(SAMPLE_SECONDS / max(once(call, device), 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name].append(once(call, device, times[name]))
    return {name: summary(values) for name, values in samples.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles and count."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "low": low, "high": high, "samples": len(values)}


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The call as a CUDA graph's replay: device time without host overhead."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay


def extra_memory(
    call: Callable[[], torch.Tensor | Sequence[torch.Tensor]], device: torch.device
) -> int:
    """Peak bytes of the call, without what was allocated before and what it returns (CUDA)."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    results = [result] if isinstance(result, torch.Tensor) else result
    return peak - before - sum(r.numel() * r.element_size() for r in results)


def saved_for_backward(call: Callable[[], torch.Tensor], owned: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps of one forward pass, without `owned` (input and weights)."""
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def copy_bandwidth(device: torch.device, repeats: int = 15) -> float:
    """Bytes read and written per second by the device's own copy of a large tensor."""
    size = 2**28 if device.type != "cpu" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, repeats)
    return 2 * size / timing["copy"]["median"]


def fp32_rate(device: torch.device) -> float | None:
    """Peak fp32 operations per second outside the tensor cores; None if the device is unknown."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "clock_rate", 0)  # kHz
    # Multiply-adds per clock and multiprocessor: 64 on A100 and on CDNA, 128 on their successors.
    few = torch.version.hip is not None or (properties.major, properties.minor) == (8, 0)
    return properties.multi_processor_count * (64 if few else 128) * 2 * clock * 1000 or None
