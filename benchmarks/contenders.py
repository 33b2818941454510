"""What is compared: self-attention, LinFusion's in two forms, and the ΔConvBlock in six.

A contender is a function x [B, N, C] → [B, N, C] with random weights, and the same function in
float64 to check it before it is timed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import Projections, SiteProjection, pyramid_projection_definition
from ..kernels.accuracy import Case, make_inputs
from ..kernels.reference import apply_gate, gated_pyramid_definition, pooled_size
from .shapes import SCALES, Row, Window, side_of

Function = Callable[[torch.Tensor], torch.Tensor]


class Contender(NamedTuple):
    """`run` is timed, `exact` computes the same in float64; their tensors are the weights.

    `at(x, window)` is `exact` in one window of a map that is too large to compute whole. `tune(x)`,
    if given, chooses how to run this shape, before timing, and returns its choice.
    """

    run: Function
    exact: Function
    tensors: list[torch.Tensor]
    exact_tensors: list[torch.Tensor]
    at: Callable[[torch.Tensor, Window], torch.Tensor]
    tune: Callable[[torch.Tensor], object] | None = None


# Tokens converted to float64 at a time.
CHUNK = 2**16


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is computed: many devices lack it."""
    return device if device.type == "cuda" else torch.device("cpu")


class Attention(nn.Module):
    """Self-attention as ComfyUI calls it: three projections, SDPA over heads, one projection."""

    def __init__(self, row: Row):
        super().__init__()
        self.heads = row.heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(row.dim, row.dim, bias=False) for _ in "qkv")
        self.to_out = nn.Linear(row.dim, row.dim)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(linear(x)) for linear in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def at(self, x: torch.Tensor, window: Window) -> torch.Tensor:
        """x [B, N, C] → the window's results [B, side², C] in the weights' dtype."""
        results = []
        for image in x.to(self.to_out.weight.device).split(1):
            image = image.to(self.to_out.weight)
            k, v = self.split(self.to_k(image)), self.split(self.to_v(image))
            q = self.split(self.to_q(window.of(image)))
            results.append(F.scaled_dot_product_attention(q, k, v))
        return self.to_out(torch.cat(results).transpose(1, 2).flatten(2))


class LinFusion(Attention):
    """LinFusion's linear attention, from its formula: q·(kᵀv/n) / (q·mean(k) + 1e-4).

    The product is divided by n, not v: v / n leaves fp16's range on large maps.
    """

    def __init__(self, row: Row):
        super().__init__(row)
        self.add_q, self.add_k = (
            nn.Sequential(
                nn.Linear(row.dim, row.linfusion),
                nn.LayerNorm(row.linfusion),
                nn.LeakyReLU(0.01),
                nn.Linear(row.linfusion, row.dim),
            )
            for _ in "qk"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.query(x), self.key(x), self.split(self.to_v(x))
        product = k.transpose(2, 3) @ v / x.shape[1]
        return self.result(q, product, k.mean(dim=2, keepdim=True))

    def query(self, x: torch.Tensor) -> torch.Tensor:
        return F.elu(self.split(self.to_q(x + self.add_q(x)))) + 1

    def key(self, x: torch.Tensor) -> torch.Tensor:
        return F.elu(self.split(self.to_k(x + self.add_k(x)))) + 1

    def result(self, q, product, mean) -> torch.Tensor:
        out = q @ product / (q @ mean.transpose(2, 3) + 1e-4)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def at(self, x: torch.Tensor, window: Window) -> torch.Tensor:
        product = mean = 0
        for chunk in x.split(CHUNK, 1):
            chunk = chunk.to(self.to_out.weight)
            k = self.key(chunk)
            product = product + k.transpose(2, 3) @ self.split(self.to_v(chunk)) / x.shape[1]
            mean = mean + k.sum(dim=2, keepdim=True) / x.shape[1]
        return self.result(self.query(window.of(x).to(self.to_out.weight)), product, mean)


class FusedLinFusion(LinFusion):
    """LinFusion's attention between its projections in two Triton kernels; float64 in torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            return super().forward(x)
        # Imported here: only what runs it needs Triton.
        from .linear_attention import attend

        q, k = self.to_q(x + self.add_q(x)), self.to_k(x + self.add_k(x))
        return self.to_out(attend(q, k, self.to_v(x), self.heads))


def _module(make, row: Row, dtype: torch.dtype, device: torch.device) -> Contender:
    torch.manual_seed(0)
    module = make(row).to(device, dtype)
    exact = make(row).to(float64_device(device), torch.float64)
    exact.load_state_dict(module.state_dict())
    tensors = [list(m.parameters()) for m in (module, exact)]
    return Contender(module, exact, *tensors, exact.at)


def from_torch(channels_last: bool):
    """The block in torch's operators, on NHWC or NCHW memory."""

    def gated_pyramid(u, weights, scales, gate):
        size = u.shape[1:3]
        x = u.movedim(-1, 1)
        x = x if channels_last else x.contiguous()
        pyramid = []
        for weight, scale in zip(weights, scales, strict=True):
            v = x if scale == 1 else F.adaptive_avg_pool2d(x, pooled_size(*size, scale))
            kernel = weight.permute(2, 0, 1).unsqueeze(1).contiguous()
            v = F.conv2d(v, kernel, padding=weight.shape[0] // 2, groups=x.shape[1])
            v = apply_gate(v, gate)
            if scale != 1:
                v = F.interpolate(v, tuple(size), mode="bilinear", align_corners=False)
            pyramid.append(v)
        return torch.cat(pyramid, dim=1).movedim(1, -1)

    return _projected(gated_pyramid)


def by_fourier(u, weights, scales, gate):
    """The gated pyramid with its convolutions as products of spectra, by torch.fft in fp32."""
    size = tuple(u.shape[1:3])
    x = u.movedim(-1, 1)
    pyramid = []
    for weight, scale in zip(weights, scales, strict=True):
        v = x if scale == 1 else F.adaptive_avg_pool2d(x, pooled_size(*size, scale))
        k = weight.shape[0]
        # Beside the map as many zeros as the kernel reaches, to a length of small factors.
        padded = [_smooth(length + k - 1) for length in v.shape[2:]]
        kernel = torch.fft.rfft2(weight.float().permute(2, 0, 1), padded)
        product = torch.fft.rfft2(v.float(), padded) * kernel.conj()
        turned = torch.fft.irfft2(product, padded).roll((k // 2, k // 2), (2, 3))
        v = apply_gate(turned[..., : v.shape[2], : v.shape[3]].to(u.dtype), gate)
        if scale != 1:
            v = F.interpolate(v, size, mode="bilinear", align_corners=False)
        pyramid.append(v)
    return torch.cat(pyramid, dim=1).movedim(1, -1)


def _smooth(length: int) -> int:
    """The next even length without factors above five, on which transforms are fast."""
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1 and length % 2 == 0:
            return length
        length += 1


def _published(*arguments) -> Contender:
    def op(*tensors):
        from .published_style import gated_pyramid

        return _projected(gated_pyramid)(*tensors)

    contender = _block(op, *arguments)
    up_weight, up_bias = contender.tensors[:2]

    def tune(x):
        from .published_style import tune

        u = F.linear(x.unflatten(1, (side_of(x), -1)), up_weight, up_bias)
        return tune(u, contender.tensors[6:], SCALES)

    return contender._replace(tune=tune)


def _projected(gated_pyramid):
    def op(x, u, weights, scales, gate, projections):
        out_weight, out_bias, pool_weight, pool_bias = projections
        context = F.linear(x.mean(dim=(1, 2), keepdim=True), pool_weight, pool_bias)
        return F.linear(gated_pyramid(u, weights, scales, gate), out_weight, out_bias) + context

    return op


def _block(op, row: Row, dtype: torch.dtype, device: torch.device) -> Contender:
    case = Case(1, 1, 1, row.dim, row.kernel_size, SCALES, row.gate)
    _, _, *tensors = make_inputs(case, dtype, device)
    up = make_inputs(case._replace(dim=2 * row.dim), dtype, device, seed=1)[2]
    # Rows of a weight [2C, C] serve as the up projection [h, C], one of them as its bias.
    tensors = [up[: row.dim // 2].contiguous(), up[0, : row.dim // 2].contiguous(), *tensors]

    def function(op, tensors):
        def run(x):
            up_weight, up_bias, *linear = tensors[:6]
            x = x.unflatten(1, (-1, round(x.shape[1] ** 0.5)))
            u = F.linear(x, up_weight, up_bias)
            return op(x, u, tensors[6:], SCALES, row.gate, Projections(*linear)).flatten(1, 2)

        return run

    exact = [tensor.to(float64_device(device), torch.float64) for tensor in tensors]

    def at(x: torch.Tensor, window: Window) -> torch.Tensor:
        # The half-resolution level reaches twice as far, plus one cell for the upsampling.
        crop, top, left = window.wider(x, 2 * (row.kernel_size // 2 + 1))
        up_weight, up_bias, out_weight, out_bias, *pool = exact[:6]
        u = F.linear(crop.to(up_weight), up_weight, up_bias)
        pyramid = gated_pyramid_definition(u, exact[6:], SCALES, row.gate)
        pyramid = pyramid[:, top : top + window.side, left : left + window.side]
        sums = [chunk.to(up_weight).sum(1, keepdim=True) for chunk in x.split(CHUNK, 1)]
        context = F.linear(sum(sums) / x.shape[1], *pool)
        return F.linear(pyramid, out_weight, out_bias).flatten(1, 2) + context

    definition = function(pyramid_projection_definition, exact)
    return Contender(function(op, tensors), definition, tensors, exact, at)


CONTENDERS: dict[str, Callable[..., Contender]] = {
    "attn1": lambda *a: _module(Attention, *a),
    "linfus": lambda *a: _module(LinFusion, *a),
    "linear": lambda *a: _module(FusedLinFusion, *a),
    "pub": _published,
    "fft": lambda *a: _block(_projected(by_fourier), *a),
    "nchw": lambda *a: _block(from_torch(channels_last=False), *a),
    "nhwc": lambda *a: _block(from_torch(channels_last=True), *a),
    # As a block of a model has it.
    "ours": lambda *a: _block(SiteProjection(), *a),
    # The same, convolved on tensor cores, where that takes the dtype.
    "bands": lambda *a: _block(SiteProjection("bands"), *a),
}
BLOCKS = ("pub", "fft", "nchw", "nhwc", "ours", "bands")
