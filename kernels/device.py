"""The default device, its name, and the environment to state beside a measurement."""

import shutil
import subprocess

import torch


def default_device() -> torch.device:
    """The accelerator that torch finds, or the CPU."""
    for name in ("cuda", "xpu", "mps"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return torch.device(name)
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The device's product name, or its type in capitals."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_name(device)
    return device.type.upper()


def environment(device: torch.device) -> dict:
    """Device, driver and versions, to be recorded with every measurement."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    driver = None
    if device.type == "cuda" and (tool := shutil.which("nvidia-smi")):
        line = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(line, capture_output=True, text=True).stdout.split("\n")[0]
    return {
        "device": device_name(device),
        "driver": driver,
        "torch": torch.__version__,
        "triton": version,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }
