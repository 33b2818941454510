"""The published way to run the pyramid, restated: a kernel per step, a masked load per tap."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..gated_pyramid import apply_gate, pooled_size


@triton.jit(do_not_specialize=["height", "width"])
def depthwise_kernel(
    x,
    weight,
    out,
    height,
    width,
    channels,
    K: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x [B, H, W, h], weight [K, K, h] → out [B, H, W, h], zero padding."""
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(2).to(tl.int64) * height * width * channels
    row, column = position // width, position % width
    inside = channel < channels
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for tap in range(K * K):
        y, z = row + tap // K - K // 2, column + tap % K - K // 2
        there = (y >= 0) & (y < height) & (z >= 0) & (z < width)
        source = x + image + (y * width + z).to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(source, mask=there[:, None] & inside[None, :], other=0.0)
        factor = tl.load(weight + tap * channels + channel, mask=inside, other=0.0)
        total += value.to(tl.float32) * factor.to(tl.float32)[None, :]
    target = out + image + position.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = (position < height * width)[:, None] & inside[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


def depthwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [B, H, W, h], weight [k, k, h] → [B, H, W, h]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    batch, height, width, channels = x.shape
    grid = (triton.cdiv(height * width, 32), triton.cdiv(channels, 32), batch)
    depthwise_kernel[grid](x, weight, out, height, width, channels, weight.shape[0], 32, 32)
    return out


def gated_pyramid(u: torch.Tensor, weights, scales, gate: str) -> torch.Tensor:
    """u [B, H, W, h] → [B, H, W, S · h/2]; see `gated_pyramid_definition`."""
    size = u.shape[1:3]
    pyramid = []
    for weight, scale in zip(weights, scales, strict=True):
        v = u
        if scale != 1:
            v = F.adaptive_avg_pool2d(u.movedim(-1, 1), pooled_size(*size, scale)).movedim(1, -1)
        v = apply_gate(depthwise(v, weight).movedim(-1, 1), gate)
        if scale != 1:
            v = F.interpolate(v, tuple(size), mode="bilinear", align_corners=False)
        pyramid.append(v.movedim(1, -1))
    return torch.cat(pyramid, dim=-1)
