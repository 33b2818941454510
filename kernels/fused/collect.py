"""What a backward pass does before and behind the gradients of its convolutions, a launch each."""

import triton
import triton.language as tl

from .pool import chunk_total, pool_line, unpool_line
from .upsample import downsample_line, upsample_lines


@triton.jit
def sum_evenly(
    program, x, partial, tokens, chunk, chunks, dim, TOKENS: tl.constexpr, SUMS: tl.constexpr
):
    """As `sum_chunk`, in two steps: the gradient of `pool` is a product of two such sums."""
    blocks = tl.cdiv(dim, SUMS)
    channel = (program % blocks) * SUMS + tl.arange(0, SUMS)
    program = program // blocks
    total = chunk_total(program, x, tokens, chunk, chunks, dim, channel, TOKENS, SUMS)
    total = tl.sum(tl.reshape(total, (8, TOKENS // 8, SUMS)), axis=1)
    tl.store(partial + program * dim + channel, tl.sum(total, axis=0), mask=channel < dim)


@triton.jit(
    do_not_specialize=[
        *("batch", "height", "width", "height1", "width1", "height2", "width2"),
        *("reach_y1", "reach_x1", "reach_y2", "reach_x2"),
        *("first_pool2", "first_down", "first_down2", "first_x", "first_gradient"),
        *("chunk", "chunks"),
    ]
)
def collect_kernel(
    u,
    x,
    gradient,
    to_pyramid,
    low,
    upstream,
    partial,
    partial_gradient,
    batch,
    height,
    width,
    height1,
    width1,
    height2,
    width2,
    reach_y1,
    reach_x1,
    reach_y2,
    reach_x2,
    first_pool2,
    first_down,
    first_down2,
    first_x,
    first_gradient,
    channels,
    half,
    dim,
    chunk,
    chunks,
    LEVELS: tl.constexpr,
    SPAN1: tl.constexpr,
    SPAN2: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COARSE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """u → low; to_pyramid → upstream of lower levels; sums of x and of gradient [B, H, W, C]."""
    program = tl.program_id(0)
    if program >= first_gradient:
        program -= first_gradient
        lengths = (height * width, chunk, chunks, dim)
        sum_evenly(program, gradient, partial_gradient, *lengths, TOKENS, SUMS)
    elif program >= first_x:
        lengths = (height * width, chunk, chunks, dim)
        sum_evenly(program - first_x, x, partial, *lengths, TOKENS, SUMS)
    elif LEVELS > 1:
        if program >= first_down:
            source, rows, columns, first = to_pyramid + half, height1, width1, first_down
            reach_y, reach_x = reach_y1, reach_x1
            if LEVELS > 2:
                if program >= first_down2:
                    source, rows, columns, first = (
                        to_pyramid + 2 * half,
                        height2,
                        width2,
                        first_down2,
                    )
                    reach_y, reach_x = reach_y2, reach_x2
                    upstream += batch.to(tl.int64) * height1 * width1 * half
            wide = (height, width, rows, columns, reach_y, reach_x, half, LEVELS * half)
            downsample_line(program - first, source, upstream, *wide, COARSE, BLOCK)
        elif program >= first_pool2:
            if LEVELS > 2:
                low += batch.to(tl.int64) * height1 * width1 * channels
                size = (height, width, height2, width2, channels)
                pool_line(program - first_pool2, u, low, *size, SPAN2, COLUMNS, CHANNELS)
        else:
            size = (height, width, height1, width1, channels)
            pool_line(program, u, low, *size, SPAN1, COLUMNS, CHANNELS)


@triton.jit
def sum_strips(
    program,
    strips,
    to_weight,
    to_bias,
    rows,
    channels,
    K: tl.constexpr,
    BIASED: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """strips [rows, K² + BIASED, h] → to_weight [K, K, h], and the last of them to_bias [h]."""
    taps = K * K * channels
    entry = program * ENTRIES + tl.arange(0, ENTRIES)
    length = taps
    if BIASED:
        length += channels
    total = tl.zeros((8, ENTRIES), tl.float32)
    for start in range(0, rows, 8):
        row = start + tl.arange(0, 8)
        mask = (row < rows)[:, None] & (entry < length)[None, :]
        total += tl.load(strips + row[:, None] * length + entry[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    tl.store(to_weight + entry, result, mask=entry < taps)
    if BIASED:
        tl.store(to_bias + entry - taps, result, mask=(entry >= taps) & (entry < length))


@triton.jit
def sum_chunks(partial, image, channel, chunks, dim, SUMS: tl.constexpr) -> tl.tensor:
    """partial [B, chunks, C] → the sums [SUMS] of one image's channels."""
    total = tl.zeros((16, SUMS), tl.float32)
    for start in range(0, chunks, 16):
        chunk = start + tl.arange(0, 16)
        mask = (chunk < chunks)[:, None] & (channel < dim)[None, :]
        source = partial + (image * chunks + chunk)[:, None] * dim + channel[None, :]
        total += tl.load(source, mask=mask, other=0.0)
    # pyrefly: ignore[bad-return]: a sum of one tensor is a tensor
    return tl.sum(total, axis=0)


@triton.jit
def project_sums(
    program,
    partial,
    partial_gradient,
    to_out_bias,
    to_pool,
    to_pool_bias,
    batch,
    chunks,
    tokens,
    dim,
    SUMS: tl.constexpr,
):
    """Sums of x and of the gradient → to_pool [C, C], and the gradient of both biases [C]."""
    blocks = tl.cdiv(dim, SUMS)
    channel = (program % blocks) * SUMS + tl.arange(0, SUMS)
    output = (program // blocks) * SUMS + tl.arange(0, SUMS)
    product = tl.zeros((SUMS, SUMS), tl.float32)
    total = tl.zeros((SUMS,), tl.float32)
    for image in range(batch):
        to_context = sum_chunks(partial_gradient, image, output, chunks, dim, SUMS)
        mean = sum_chunks(partial, image, channel, chunks, dim, SUMS) / tokens
        product += to_context[:, None] * mean[None, :]
        total += to_context
    mask = (output < dim)[:, None] & (channel < dim)[None, :]
    tl.store(to_pool + output[:, None] * dim + channel[None, :], product, mask=mask)
    first = (output < dim) & (program % blocks == 0)
    tl.store(to_out_bias + output, total, mask=first)
    tl.store(to_pool_bias + output, total, mask=first)


@triton.jit
def project_to_mean(
    program, partial_gradient, weight, to_mean, chunks, tokens, dim, SUMS: tl.constexpr
):
    """Sums of the gradient · weight [C, C] → to_mean [B, C], what every position of x gets."""
    blocks = tl.cdiv(dim, SUMS)
    channel = (program % blocks) * SUMS + tl.arange(0, SUMS)
    image = program // blocks
    total = tl.zeros((SUMS,), tl.float32)
    for start in range(0, dim, SUMS):
        output = start + tl.arange(0, SUMS)
        to_context = sum_chunks(partial_gradient, image, output, chunks, dim, SUMS)
        mask = (output < dim)[:, None] & (channel < dim)[None, :]
        rows = tl.load(weight + output[:, None] * dim + channel[None, :], mask=mask, other=0.0)
        total += tl.sum(rows.to(tl.float32) * to_context[:, None], axis=0)
    tl.store(to_mean + image * dim + channel, total / tokens, mask=channel < dim)


@triton.jit(
    do_not_specialize=[
        *("batch", "height", "width", "height1", "width1", "height2", "width2"),
        *("first_up", "first_up2", "first_strip", "first_strip1", "first_strip2"),
        *("first_pool", "first_mean", "rows0", "rows1", "rows2", "start1", "start2", "chunks"),
    ]
)
def finish_kernel(
    to_low,
    to_u,
    gated_low,
    pyramid,
    strips,
    to_weight0,
    to_weight1,
    to_weight2,
    to_bias0,
    to_bias1,
    to_bias2,
    partial,
    partial_gradient,
    pool_weight,
    to_mean,
    to_out_bias,
    to_pool,
    to_pool_bias,
    batch,
    height,
    width,
    height1,
    width1,
    height2,
    width2,
    first_up,
    first_up2,
    first_strip,
    first_strip1,
    first_strip2,
    first_pool,
    first_mean,
    rows0,
    rows1,
    rows2,
    start1,
    start2,
    channels,
    half,
    dim,
    chunks,
    LEVELS: tl.constexpr,
    BIASED: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LINES: tl.constexpr,
    FINE: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    SUMS: tl.constexpr,
):
    """to_low → added to to_u; gated_low → pyramid; strips → gradients of kernels and biases.

    Sums of x and of the gradient → to_mean [B, C] and the gradients of the pooled branch.
    """
    program = tl.program_id(0)
    tokens = height * width
    if program >= first_mean:
        program -= first_mean
        count = tokens.to(tl.float32)
        project_to_mean(program, partial_gradient, pool_weight, to_mean, chunks, count, dim, SUMS)
    elif program >= first_pool:
        program -= first_pool
        targets = (to_out_bias, to_pool, to_pool_bias, batch, chunks, tokens.to(tl.float32), dim)
        project_sums(program, partial, partial_gradient, *targets, SUMS)
    elif program >= first_strip:
        if program < first_strip1:
            program -= first_strip
            sum_strips(
                *(program, strips, to_weight0, to_bias0, rows0, channels),
                *(K, BIASED & 1, ENTRIES),
            )
        elif program < first_strip2:
            if LEVELS > 1:
                program -= first_strip1
                sum_strips(
                    *(program, strips + start1, to_weight1, to_bias1, rows1, channels),
                    *(K, (BIASED >> 1) & 1, ENTRIES),
                )
        elif LEVELS > 2:
            program -= first_strip2
            sum_strips(
                *(program, strips + start2, to_weight2, to_bias2, rows2, channels),
                *(K, (BIASED >> 2) & 1, ENTRIES),
            )
    elif LEVELS > 1:
        if program < first_up:
            sizes = (batch, height, width, height1, width1, height2, width2, channels)
            unpool_line(program, to_low, to_u, *sizes, LEVELS, COLUMNS, CHANNELS)
        else:
            source, target, first = gated_low, pyramid + half, first_up
            rows, columns = height1, width1
            if LEVELS > 2:
                if program >= first_up2:
                    source = gated_low + batch.to(tl.int64) * height1 * width1 * half
                    target, first = pyramid + 2 * half, first_up2
                    rows, columns = height2, width2
            wide = (height, width, rows, columns, half, LEVELS * half)
            upsample_lines(program - first, source, target, *wide, LINES, FINE, BLOCK)
