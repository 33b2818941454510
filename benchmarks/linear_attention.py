"""LinFusion's attention as two Triton kernels, without a map of keys and values between them.

Sums over tokens of kᵀv and k, by head, then q · sums / (q · mean). Both take the projections as
the library left them and apply elu(·) + 1 to q and k on the way.
"""

from math import ceil

import torch
import triton
import triton.language as tl

# Tokens of one product, of one program that sums, and values of a program.
TOKENS, CHUNK, VALUES = 64, 512, 64


@triton.jit
def feature(x):
    """elu(x) + 1 of fp32."""
    return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def sum_kernel(
    k,
    v,
    sums,
    tokens,
    dim,
    heads,
    width,
    chunks,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """k, v [B, N, C] → sums [chunks, B, heads, width, width + 1] of kᵀv and, in the last, of k."""
    program = tl.program_id(0)
    blocks = tl.cdiv(width, VALUES)
    value = (program % blocks) * VALUES + tl.arange(0, VALUES)
    program = program // blocks
    chunk = program % chunks
    program = program // chunks
    head, image = program % heads, program // heads
    feature_of = tl.arange(0, WIDTH)
    start = image.to(tl.int64) * tokens * dim + head * width
    product = tl.zeros((WIDTH, VALUES), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tokens), TOKENS):
        token = first + tl.arange(0, TOKENS)
        row = (start + token.to(tl.int64) * dim)[:, None]
        inside = (token < tokens)[:, None]
        mask = inside & (feature_of < width)[None, :]
        keys = tl.load(k + row + feature_of[None, :], mask=mask, other=0.0)
        keys = tl.where(mask, feature(keys.to(tl.float32)), 0.0)
        total += tl.sum(keys, axis=0)
        mask = inside & (value < width)[None, :]
        values = tl.load(v + row + value[None, :], mask=mask, other=0.0)
        keys = tl.trans(keys.to(values.dtype))
        product = tl.dot(keys, values, product, input_precision="ieee")
    line = (chunk * (tl.num_programs(0) // (blocks * chunks)) + program).to(tl.int64) * width
    target = sums + (line + feature_of[:, None]) * (width + 1)
    mask = (feature_of < width)[:, None] & (value < width)[None, :]
    tl.store(target + value[None, :], product, mask=mask)
    last = sums + (line + feature_of) * (width + 1) + width
    # Every block of values has the same sum; the first stores it.
    tl.store(last, total, mask=(feature_of < width) & (tl.min(value, axis=0) == 0))


@triton.jit
def attend_kernel(
    q,
    sums,
    out,
    tokens,
    dim,
    heads,
    width,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """q [B, N, C], sums [B, heads, width, width + 1] → out [B, N, C]: q · sums / (q · mean)."""
    program = tl.program_id(0)
    blocks, down = tl.cdiv(width, VALUES), tl.cdiv(tokens, TOKENS)
    value = (program % blocks) * VALUES + tl.arange(0, VALUES)
    program = program // blocks
    token = (program % down) * TOKENS + tl.arange(0, TOKENS)
    program = program // down
    head, image = program % heads, program // heads
    feature_of = tl.arange(0, WIDTH)
    row = (image.to(tl.int64) * tokens * dim + head * width + token.to(tl.int64) * dim)[:, None]
    inside = (token < tokens)[:, None]
    mask = inside & (feature_of < width)[None, :]
    queries = feature(tl.load(q + row + feature_of[None, :], mask=mask, other=0.0).to(tl.float32))
    line = (program * width + feature_of) * (width + 1)
    mean = tl.load(sums + line + width, mask=feature_of < width, other=0.0) / tokens
    mask = (feature_of < width)[:, None] & (value < width)[None, :]
    product = tl.load(sums + line[:, None] + value[None, :], mask=mask, other=0.0) / tokens
    kind: tl.constexpr = q.dtype.element_ty
    over = tl.sum(queries * mean[None, :], axis=1) + 1e-4
    result = tl.dot(queries.to(kind), product.to(kind), input_precision="ieee") / over[:, None]
    tl.store(out + row + value[None, :], result.to(kind), mask=inside & (value < width)[None, :])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """q, k before elu, v [B, N, C] → [B, N, C]: LinFusion's attention over `heads`."""
    batch, tokens, dim = q.shape
    width, chunks = dim // heads, ceil(tokens / CHUNK)
    wide = max(16, triton.next_power_of_2(width))
    blocks = ceil(width / VALUES)
    options = {"device": q.device, "dtype": torch.float32}
    sums = torch.empty(chunks, batch, heads, width, width + 1, **options)
    sizes = (tokens, dim, heads, width)
    tile = {"WIDTH": wide, "VALUES": VALUES, "TOKENS": TOKENS}
    grid = (batch * heads * chunks * blocks,)
    # Sums of wide heads fill the registers of four warps.
    warps = 8 if wide > 128 else 4
    sum_kernel[grid](k, v, sums, *sizes, chunks, **tile, CHUNK=CHUNK, num_warps=warps)
    out = torch.empty_like(q)
    grid = (batch * heads * ceil(tokens / TOKENS) * blocks,)
    attend_kernel[grid](q, sums.sum(0), out, *sizes, **tile, num_warps=warps)
    return out
