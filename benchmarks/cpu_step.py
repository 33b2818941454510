"""The demo student's blocks at 64 × 64 on the CPU: as they run now, as first written, with tokens.

All ten blocks of one step behind each other, in turns in one process, so that a busy machine is as
busy for both.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..deltaconv import DeltaConvBlock, demo, read_weights
from ..deltaconv.distillation.token_plans import TOKEN_PLAN
from ..deltaconv.families import resolution_level
from ..deltaconv.flops import halved
from ..kernels import gated_pyramid_definition
from ..kernels.accuracy import distance
from ..kernels.device import environment
from ..kernels.timing import interleaved
from . import BenchmarkError

CPU = torch.device("cpu")
# The names that earlier results have, too.
NOW, FIRST = "as dispatched now", "as first written"
# 5 × 5 kernels beside pooled tokens of the layer's own heads, as `plans_with_tokens` has them.
TOKENS = "5 and pooled tokens"


def _load() -> tuple[float, float, float] | None:
    """Load averages over 1, 5 and 15 minutes; None on a system that has none."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def first_written(block: DeltaConvBlock, x: torch.Tensor) -> torch.Tensor:
    """x [B, H, W, C] → [B, H, W, C] by the definition's operators alone."""
    u = block.conv_up(x)
    kernels = [gate.conv_spatial.weight for gate in block.gates]
    pyramid = gated_pyramid_definition(u, kernels, block.scales, block.gate)
    return block.conv_out(pyramid) + block.conv_pool(x.mean(dim=(1, 2), keepdim=True))


def operator_shares(call: Callable[[], object], repeats: int = 10) -> dict[str, float]:
    """Operator of torch → its own share of the call's time, the largest first, from 1% on."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(repeats):
            call()
    seconds = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    total = sum(seconds.values())
    shares = {name: own / total for name, own in seconds.items() if own >= total / 100}
    return dict(sorted(shares.items(), key=lambda each: -each[1]))


@torch.inference_mode()
def run(batch: int, repeats: int, path: Path | None = None) -> dict:
    """Seconds of both ways, as one JSON-ready report; prints them and writes `path`."""
    weights = read_weights(demo.DELTACONV_PATH)
    levels = demo.unet_config()["num_res_blocks"]
    generator, calls = torch.Generator().manual_seed(0), []
    head_size, pooled = demo.unet_config()["num_head_channels"], []
    for site in weights.sites:
        block = weights.block(site).float()
        side = halved(demo.NATIVE_SIZE, resolution_level(site, levels))
        x = torch.randn(batch, side, side, block.dim, generator=generator)
        if distance(block(x), first_written(block, x).double()).worst > 1e-4:
            raise BenchmarkError(
                f"Expected both formulations to agree at {site}; nothing was timed."
            )
        calls.append((block, x))
        tokens = (block.dim, TOKEN_PLAN.kernel, TOKEN_PLAN.scales)
        pooled.append((DeltaConvBlock(*tokens, heads=block.dim // head_size), x))
    ways = {
        NOW: lambda: [block(x) for block, x in calls],
        FIRST: lambda: [first_written(block, x) for block, x in calls],
        TOKENS: lambda: [block(x) for block, x in pooled],
    }
    report = {
        "environment": environment(CPU) | {"cores": os.cpu_count(), "load": _load()},
        **{"batch": batch, "blocks": len(calls), "side": demo.NATIVE_SIZE},
        "times": interleaved(ways, CPU, repeats),
        "parts": operator_shares(ways[NOW]),
    }
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    about = report["environment"]
    print(
        f"{len(calls)} blocks of the demo student at 64 × 64, fp32, batch {batch}, "
        f"{about['threads']} threads on {about['cores']} cores, torch {about['torch']}"
        + (f"; load average over a minute {load[0]:.1f}" if (load := about["load"]) else "")
    )
    for name, timing in report["times"].items():
        low, middle, high = (timing[key] * 1e3 for key in ("low", "median", "high"))
        print(f"{name}: {middle:.1f} ms ({low:.1f} to {high:.1f}), {timing['samples']} repeats")
    shares = (f"{name} {share:.0%}" for name, share in report["parts"].items())
    print(f"of it, {NOW}: {', '.join(shares)}")
    return report
