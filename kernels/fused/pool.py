"""Adaptive average pooling of u to every lower level, its adjoint, and partial sums of x."""

import triton
import triton.language as tl


@triton.jit
def window(index, size, pooled):
    """Pooled index → first and last-but-one source index, as `adaptive_avg_pool2d` has them."""
    return index * size // pooled, ((index + 1) * size + pooled - 1) // pooled


@triton.jit
def span(size, pooled):
    """The widest window of a pooling from `size` to `pooled`."""
    return tl.where(size % pooled == 0, size // pooled, tl.cdiv(size, pooled) + 1)


@triton.jit
def pooled(
    u,
    line,
    column,
    channel,
    inside,
    height,
    width,
    rows,
    columns,
    channels,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """u [B, H, W, h] → means [COLUMNS, CHANNELS] of row `line` of [B, rows, columns, h].

    SPAN: every window is SPAN × SPAN; 0 where they differ.
    """
    row_stride = width.to(tl.int64) * channels
    first = u + (line // rows) * height * row_stride
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    if SPAN > 0:
        first += (line % rows) * SPAN * row_stride
        offsets = column[:, None] * SPAN * channels + channel[None, :]
        for i in tl.static_range(SPAN * SPAN):
            source = first + (i // SPAN) * row_stride + (i % SPAN) * channels
            total += tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
        mean = total / (SPAN * SPAN)
    else:
        top, bottom = window(line % rows, height, rows)
        left, right = window(column, width, columns)
        for y in range(top, bottom):
            source = first + y * row_stride
            for step in range(span(width, columns)):
                x = left + step
                offsets = x[:, None] * channels + channel[None, :]
                mask = inside & (x < right)[:, None]
                total += tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = total / ((bottom - top) * (right - left)).to(tl.float32)[:, None]
    return mean


@triton.jit
def pool_line(
    program,
    u,
    low,
    height,
    width,
    rows,
    columns,
    channels,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """u [B, H, W, h] → COLUMNS pooled positions of one row of low [B, rows, columns, h]."""
    blocks = tl.cdiv(channels, CHANNELS)
    across = tl.cdiv(columns, COLUMNS)
    channel = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    line = program // across  # image · rows + row
    inside = (column < columns)[:, None] & (channel < channels)[None, :]
    size = (height, width, rows, columns, channels)
    mean = pooled(u, line, column, channel, inside, *size, SPAN, COLUMNS, CHANNELS)
    offsets = column[:, None] * channels + channel[None, :]
    target = low + line.to(tl.int64) * columns * channels + offsets
    tl.store(target, mean.to(low.dtype.element_ty), mask=inside)


@triton.jit
def chunk_total(
    program, x, tokens, chunk, chunks, dim, channel, TOKENS: tl.constexpr, SUMS: tl.constexpr
):
    """x [B, tokens, C] → [TOKENS, SUMS]: one chunk's sums over every TOKENS-th token, in fp32."""
    image, start = program // chunks, (program % chunks) * chunk
    stop = tl.minimum(start + chunk, tokens)
    line = tl.arange(0, TOKENS)
    offsets = line[:, None] * dim + channel[None, :]
    source = x + (image.to(tl.int64) * tokens + start) * dim
    total = tl.zeros((TOKENS, SUMS), tl.float32)
    for token in range(start, stop, TOKENS):
        mask = (token + line < stop)[:, None] & (channel < dim)[None, :]
        total += tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32)
        source += TOKENS * dim
    return total


@triton.jit
def sum_chunk(
    program, x, partial, tokens, chunk, chunks, dim, TOKENS: tl.constexpr, SUMS: tl.constexpr
):
    """x [B, tokens, C] → partial [B, chunks, C]: one chunk's sum over tokens, in fp32."""
    blocks = tl.cdiv(dim, SUMS)
    channel = (program % blocks) * SUMS + tl.arange(0, SUMS)
    program = program // blocks
    total = chunk_total(program, x, tokens, chunk, chunks, dim, channel, TOKENS, SUMS)
    target = partial + (program // chunks * chunks + program % chunks) * dim + channel
    tl.store(target, tl.sum(total, axis=0), mask=channel < dim)


@triton.jit(
    do_not_specialize=[
        *("batch", "height", "width", "height1", "width1", "height2", "width2"),
        *("first2", "first_mean", "chunk", "chunks"),
    ]
)
def pool_kernel(
    u,
    low,
    x,
    partial,
    batch,
    height,
    width,
    height1,
    width1,
    height2,
    width2,
    first2,
    first_mean,
    channels,
    dim,
    chunk,
    chunks,
    LEVELS: tl.constexpr,
    SPAN1: tl.constexpr,
    SPAN2: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """u [B, H, W, h] → low, level 1 followed by level 2; x [B, H, W, C] → partial sums."""
    program = tl.program_id(0)
    if program >= first_mean:
        tokens = height * width
        sum_chunk(program - first_mean, x, partial, tokens, chunk, chunks, dim, TOKENS, SUMS)
    elif program >= first2:
        if LEVELS > 2:
            low += batch.to(tl.int64) * height1 * width1 * channels
            size = (height, width, height2, width2, channels)
            pool_line(program - first2, u, low, *size, SPAN2, COLUMNS, CHANNELS)
    elif LEVELS > 1:
        size = (height, width, height1, width1, channels)
        pool_line(program, u, low, *size, SPAN1, COLUMNS, CHANNELS)


@triton.jit
def spread(total, low, image, y, x, height, width, rows, columns, channel, inside, channels):
    """Adds to total [COLUMNS, CHANNELS] what the pooled gradients `low` give position (y, x)."""
    top = y * rows // height
    left = x * columns // width
    # If sizes do not divide, windows overlap by at most one position on either side.
    for down in range(2):
        i = top + down
        first_y, last_y = window(i, height, rows)
        row_counts = (i < rows) & (first_y <= y) & (y < last_y)
        for right in range(2):
            j = left + right
            first_x, last_x = window(j, width, columns)
            counts = row_counts & (j < columns) & (first_x <= x) & (x < last_x)
            area = ((last_y - first_y) * (last_x - first_x)).to(tl.float32)
            position = ((image * rows + i) * columns + j).to(tl.int64)
            source = low + position[:, None] * channels + channel[None, :]
            value = tl.load(source, mask=inside & counts[:, None], other=0.0).to(tl.float32)
            total += value / area[:, None]
    return total


@triton.jit
def unpool_line(
    program,
    to_low,
    to_u,
    batch,
    height,
    width,
    height1,
    width1,
    height2,
    width2,
    channels,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The adjoint of the pooling: to_u [B, H, W, h] += what to_low spreads."""
    blocks = tl.cdiv(channels, CHANNELS)
    across = tl.cdiv(width, COLUMNS)
    channel = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    x = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    line = program // across
    image, y = (line // height).to(tl.int64), line % height
    inside = (x < width)[:, None] & (channel < channels)[None, :]
    offsets = x[:, None] * channels + channel[None, :]
    target = to_u + line.to(tl.int64) * width * channels + offsets
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    total = spread(
        total, to_low, image, y, x, height, width, height1, width1, channel, inside, channels
    )
    if LEVELS > 2:
        to_low += batch.to(tl.int64) * height1 * width1 * channels
        total = spread(
            total, to_low, image, y, x, height, width, height2, width2, channel, inside, channels
        )
    tl.store(target, total.to(to_u.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["batch", "height", "width", "height1", "width1", "height2", "width2"]
)
def unpool_kernel(
    to_low,
    to_u,
    batch,
    height,
    width,
    height1,
    width1,
    height2,
    width2,
    channels,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """`unpool_line` of all levels."""
    size = (batch, height, width, height1, width1, height2, width2, channels)
    unpool_line(tl.program_id(0), to_low, to_u, *size, LEVELS, COLUMNS, CHANNELS)
