"""The ops in torch's own operators, in the fastest formulation per device and kernel size."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .reference import Biases, Projections, apply_gate, pooled_size


def prefers_channels_last(device: torch.device, kernel_size: int) -> bool:
    """Whether a depthwise convolution of that size is faster on NHWC memory than on NCHW.

    Measured: on a CPU 2 to 50 times at every size, on an H100 up to k = 7.
    """
    return device.type == "cpu" or kernel_size <= 7


def depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [B, h, H, W], weight [k, k, h], bias [h] → [B, h, H, W], zero padding, dtype of x."""
    k = weight.shape[0]
    kernel = weight.permute(2, 0, 1).unsqueeze(1)
    if not torch.is_grad_enabled():
        # The library reorders a strided kernel slowly; the backward pass is faster without a copy.
        kernel = kernel.contiguous()
    dtype = x.dtype
    if x.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        # Without native 16-bit arithmetic the library falls back to a loop 100 times slower.
        x, kernel = x.float(), kernel.float()
        bias = None if bias is None else bias.float()
    return F.conv2d(x, kernel, bias, padding=k // 2, groups=x.shape[1]).to(dtype)


def gated_pyramid(
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    biases: Biases = (),
) -> torch.Tensor:
    """u [B, H, W, h], kernels [k, k, h] → [B, H, W, S · h/2]; see `gated_pyramid_definition`."""
    height, width = u.shape[1:3]
    x = u.movedim(-1, 1)
    if prefers_channels_last(u.device, weights[0].shape[0]):
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        x = x.contiguous()
    pyramid = []
    biases = biases or (None,) * len(scales)
    for weight, bias, scale in zip(weights, biases, scales, strict=True):
        v = x if scale == 1 else F.adaptive_avg_pool2d(x, pooled_size(height, width, scale))
        v = apply_gate(depthwise(v, weight, bias), gate)
        if scale != 1:
            v = F.interpolate(v, (height, width), mode="bilinear", align_corners=False)
        pyramid.append(v)
    # One scale alone would be copied.
    joined = torch.cat(pyramid, dim=1) if len(pyramid) > 1 else pyramid[0]
    return joined.movedim(1, -1).contiguous()


def pyramid_projection(
    x: torch.Tensor,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    projections: Projections,
    biases: Biases = (),
) -> torch.Tensor:
    """x [B, H, W, C], u [B, H, W, h] → [B, H, W, C]; see `pyramid_projection_definition`."""
    out_weight, out_bias, pool_weight, pool_bias = projections
    pyramid = gated_pyramid(u, weights, scales, gate, biases)
    mean = x.mean(dim=(1, 2), keepdim=True).to(u.dtype)
    context = F.linear(mean, pool_weight, pool_bias)
    result = F.linear(pyramid, out_weight, out_bias)
    return result + context if torch.is_grad_enabled() else result.add_(context)


def gated_pyramid_backward(
    gradient: torch.Tensor,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    biases: Biases = (),
    out: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """gradient [B, H, W, S · h/2] → gradients of u [B, H, W, h], every kernel [k, k, h], bias [h].

    Everything is recomputed from u; `out`, if given, receives the pyramid. torch's own backward
    operators are called by name, because autograd is off inside an operator.
    """
    aten, (height, width) = torch.ops.aten, u.shape[1:3]
    half, size = u.shape[3] // 2, (height, width)
    x, gradient = u.movedim(-1, 1), gradient.movedim(-1, 1)
    to_x, to_weights, to_biases = torch.zeros_like(x), [], []
    biases = biases or (None,) * len(scales)
    for level, (weight, bias, scale) in enumerate(zip(weights, biases, scales, strict=True)):
        pooled = pooled_size(height, width, scale)
        v = x if scale == 1 else F.adaptive_avg_pool2d(x, pooled)
        a, b = depthwise(v, weight, bias).chunk(2, dim=1)
        here = slice(level * half, (level + 1) * half)
        g = gradient[:, here]
        if out is not None:
            gated = apply_gate(torch.cat((a, b), dim=1), gate)
            if scale != 1:
                gated = F.interpolate(gated, size, mode="bilinear", align_corners=False)
            out[..., here] = gated.movedim(1, -1)
        if scale != 1:
            shape = (*a.shape[:2], *pooled)
            g = aten.upsample_bilinear2d_backward(g.contiguous(), size, shape, False, None, None)
        share = b.sigmoid()
        if gate == "scaled":
            to_v = torch.cat((g * b, g * a), dim=1) * half**0.5
        else:
            to_v = torch.cat((g * share, g * a * share * (1 - share)), dim=1)
        to_v, to_weight, to_bias = _depthwise_backward(to_v, v, weight, bias is not None)
        to_weights.append(to_weight)
        if bias is not None:
            to_biases.append(to_bias)
        to_x += to_v if scale == 1 else aten._adaptive_avg_pool2d_backward(to_v, x)
    return [to_x.movedim(1, -1).contiguous(), *to_weights, *to_biases]


def _depthwise_backward(gradient, x, weight, biased: bool) -> tuple[torch.Tensor, ...]:
    """gradient, x [B, h, H, W], weight [k, k, h] → gradients of x, weight and, if any, bias [h]."""
    k, channels = weight.shape[0], x.shape[1]
    kernel = weight.permute(2, 0, 1).unsqueeze(1)
    # stride, padding, dilation, transposed, output padding, groups, which gradients
    geometry = ([1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], channels, [True, True, biased])
    to_x, to_kernel, to_bias = torch.ops.aten.convolution_backward(
        gradient, x, kernel, [channels] if biased else None, *geometry
    )
    return to_x, to_kernel[:, 0].permute(1, 2, 0).contiguous(), to_bias


def pyramid_projection_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[float],
    gate: str,
    projections: Projections,
    biases: Biases = (),
) -> list[torch.Tensor]:
    """gradient [B, H, W, C] → gradients of x, u, projections, kernels and biases.

    x's is [B, 1, 1, C], the same at every position. Biases [h] are those that are there.
    """
    batch, _, _, dim = x.shape
    out_weight, pool_weight = projections.out_weight, projections.pool_weight
    rows = gradient.reshape(-1, dim)
    pyramid = torch.empty(*u.shape[:3], out_weight.shape[1], dtype=u.dtype, device=u.device)
    to_pyramid = (rows @ out_weight).view_as(pyramid)
    to_u, *to_weights = gated_pyramid_backward(
        to_pyramid, u, weights, scales, gate, biases, pyramid
    )
    to_out = rows.t() @ pyramid.view(len(rows), -1)
    # Sums over all positions, and the two small products of them, stay in fp32 at least.
    wide = torch.promote_types(u.dtype, torch.float32)
    to_context = gradient.sum(dim=(1, 2), dtype=wide)
    to_bias = to_context.sum(0).to(u.dtype)
    to_pool = (to_context.t() @ x.mean(dim=(1, 2), dtype=wide)).to(u.dtype)
    to_mean = to_context @ pool_weight.to(wide) / (x.shape[1] * x.shape[2])
    to_mean = to_mean.view(batch, 1, 1, dim).to(x.dtype)
    return [to_mean, to_u, to_out, to_bias, to_pool, to_bias.clone(), *to_weights]
