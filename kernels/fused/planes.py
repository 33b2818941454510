"""Channel-major maps: u turned into planes with zeros beside them, and what reads such planes.

A plane is one channel of one level of one image: rows of `padded` positions, HALO zeros before the
map and at least as many behind it. A tile of STEP columns is then read with its HALO on both sides
without a mask and on whole vectors, for any width of the map.
"""

import triton
import triton.language as tl

from .pool import pooled, sum_chunk
from .upsample import neighbours, project_mean


@triton.jit
def place(channel, position, line, channels, rows, padded):
    """Offset in [B, channels, rows, padded] of a position of row `line`, image · rows + y."""
    image = (line // rows).to(tl.int64)
    return ((image * channels + channel) * rows + line % rows) * padded + position


@triton.jit
def turn_line(
    program,
    u,
    planes,
    height,
    width,
    padded,
    channels,
    HALO: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """u [B, H, W, h] → COLUMNS positions of one row of CHANNELS planes."""
    blocks = tl.cdiv(channels, CHANNELS)
    across = tl.cdiv(padded, COLUMNS)
    channel = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    position = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    line = program // across
    x = position - HALO
    inside = ((x >= 0) & (x < width))[:, None] & (channel < channels)[None, :]
    source = u + line.to(tl.int64) * width * channels
    value = tl.load(source + x[:, None] * channels + channel[None, :], mask=inside, other=0.0)
    target = planes + place(channel[None, :], position[:, None], line, channels, height, padded)
    tl.store(target, value, mask=(position < padded)[:, None] & (channel < channels)[None, :])


@triton.jit
def turn_pair(
    program,
    u,
    planes,
    low,
    height,
    width,
    padded,
    rows,
    padded1,
    channels,
    HALO: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Two rows of u [B, 2 · rows, W, h] → their planes, and one row of the planes of level 1.

    COLUMNS positions of level 1 and the two of the full level under each of them: u is read once.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    across = tl.cdiv(padded1, COLUMNS)
    channel = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    first = (program % across) * COLUMNS
    line = program // across
    x = 2 * (first - HALO) + tl.arange(0, 2 * COLUMNS)
    lane = (channel < channels)[None, :]
    inside = ((x >= 0) & (x < width))[:, None] & lane
    # Level 1 has as many zeros on the left, which are twice as far away here.
    position = 2 * first - HALO + tl.arange(0, 2 * COLUMNS)
    kept = ((position >= 0) & (position < padded))[:, None] & lane
    offsets = x[:, None] * channels + channel[None, :]
    total = tl.zeros((2 * COLUMNS, CHANNELS), tl.float32)
    for i in tl.static_range(2):
        source = u + (2 * line + i).to(tl.int64) * width * channels
        value = tl.load(source + offsets, mask=inside, other=0.0)
        target = place(channel[None, :], position[:, None], 2 * line + i, channels, height, padded)
        tl.store(planes + target, value, mask=kept)
        total += value.to(tl.float32)
    mean = tl.sum(tl.reshape(total * 0.25, (COLUMNS, 2, CHANNELS)), axis=1)
    position = first + tl.arange(0, COLUMNS)
    target = low + place(channel[None, :], position[:, None], line, channels, rows, padded1)
    mask = (position < padded1)[:, None] & lane
    tl.store(target, mean, mask=mask)


@triton.jit
def pool_planes(
    program,
    u,
    low,
    height,
    width,
    rows,
    columns,
    padded,
    channels,
    HALO: tl.constexpr,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """u [B, H, W, h] → COLUMNS pooled positions of one row of CHANNELS planes."""
    blocks = tl.cdiv(channels, CHANNELS)
    across = tl.cdiv(padded, COLUMNS)
    channel = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    position = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    line = program // across
    x = position - HALO
    here = (x >= 0) & (x < columns)
    inside = here[:, None] & (channel < channels)[None, :]
    # Windows beside the map are empty, and no mean is divided by nothing.
    column = tl.where(here, x, 0)
    size = (height, width, rows, columns, channels)
    mean = pooled(u, line, column, channel, inside, *size, SPAN, COLUMNS, CHANNELS)
    mask = (position < padded)[:, None] & (channel < channels)[None, :]
    target = low + place(channel[None, :], position[:, None], line, channels, rows, padded)
    tl.store(target, tl.where(inside, mean, 0.0).to(low.dtype.element_ty), mask=mask)


@triton.jit
def make_bands(
    program,
    weight0,
    weight1,
    weight2,
    bands,
    channels,
    K: tl.constexpr,
    STEP: tl.constexpr,
    HALO: tl.constexpr,
    LANES: tl.constexpr,
):
    """Kernels [K, K, h] → bands [level, h, K, STEP + 2 · HALO, STEP], of one row shift.

    A row of inputs times a band is a row of the convolution: output n takes input i by the kernel's
    column i - n - (HALO - K // 2), and 0 where there is none.
    """
    SPAN: tl.constexpr = STEP + 2 * HALO
    blocks = tl.cdiv(channels, LANES)
    channel = (program % blocks) * LANES + tl.arange(0, LANES)
    program = program // blocks
    dy, level = program % K, program // K
    weight = weight0
    if level == 1:
        weight = weight1
    if level == 2:
        weight = weight2
    entry = tl.arange(0, SPAN * STEP)
    dx = entry // STEP - entry % STEP - (HALO - K // 2)
    inside = (channel < channels)[:, None]
    tap = weight + (dy * K + dx)[None, :] * channels + channel[:, None]
    value = tl.load(tap, mask=inside & ((dx >= 0) & (dx < K))[None, :], other=0.0)
    target = ((level * channels + channel[:, None]).to(tl.int64) * K + dy) * (SPAN * STEP)
    tl.store(bands + target + entry[None, :], value, mask=inside)


@triton.jit(
    do_not_specialize=[
        *("batch", "height", "width", "height1", "width1", "height2", "width2"),
        *("tiles", "tiles1", "tiles2", "first1", "first2", "first_band", "first_mean"),
        *("chunk", "chunks"),
    ]
)
def turn_kernel(
    u,
    x,
    weight0,
    weight1,
    weight2,
    planes,
    bands,
    partial,
    batch,
    height,
    width,
    height1,
    width1,
    height2,
    width2,
    tiles,
    tiles1,
    tiles2,
    first1,
    first2,
    first_band,
    first_mean,
    channels,
    dim,
    chunk,
    chunks,
    LEVELS: tl.constexpr,
    SPAN1: tl.constexpr,
    SPAN2: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """u [B, H, W, h] → planes of every level; kernels → bands; x [B, H, W, C] → partial sums.

    Where level 1 halves the map, the programs of the full level make it as well.
    """
    HALO: tl.constexpr = STEP // 2
    program = tl.program_id(0)
    padded, padded1, padded2 = (tiles + 1) * STEP, (tiles1 + 1) * STEP, (tiles2 + 1) * STEP
    low = planes + batch.to(tl.int64) * channels * height * padded
    if program >= first_mean:
        tokens = height * width
        sum_chunk(program - first_mean, x, partial, tokens, chunk, chunks, dim, TOKENS, SUMS)
    elif program >= first_band:
        taps = (weight0, weight1, weight2)
        make_bands(program - first_band, *taps, bands, channels, K, STEP, HALO, LANES)
    elif program >= first2:
        if LEVELS > 2:
            low += batch.to(tl.int64) * channels * height1 * padded1
            size = (height, width, height2, width2, padded2, channels)
            pool_planes(program - first2, u, low, *size, HALO, SPAN2, COLUMNS, CHANNELS)
    elif program >= first1:
        if LEVELS > 1:
            size = (height, width, height1, width1, padded1, channels)
            pool_planes(program - first1, u, low, *size, HALO, SPAN1, COLUMNS, CHANNELS)
    elif SPAN1 == 2:
        size = (height, width, padded, height1, padded1, channels)
        turn_pair(program, u, planes, low, *size, HALO, COLUMNS, CHANNELS)
    else:
        turn_line(program, u, planes, height, width, padded, channels, HALO, COLUMNS, CHANNELS)


@triton.jit(
    do_not_specialize=[
        *("batch", "height", "width", "height1", "width1", "height2", "width2"),
        *("vectors", "first2", "first_context"),
    ]
)
def upsample_planes_kernel(
    gated_low,
    pyramid,
    mean,
    pool_weight,
    pool_bias,
    out_bias,
    context,
    batch,
    height,
    width,
    height1,
    width1,
    height2,
    width2,
    vectors,
    first2,
    first_context,
    half,
    dim,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """gated_low [B, h/2, ·, ·] → the lower levels' planes of pyramid; mean → context.

    pyramid is [B, LEVELS · h/2, 16 · vectors], of which the first H · W positions count.
    """
    program = tl.program_id(0)
    if program >= first_context:
        program = program - first_context
        project_mean(program, mean, pool_weight, pool_bias, out_bias, context, dim, OUTPUTS, INPUTS)
    elif LEVELS > 1:
        source, level, rows, columns = gated_low, 1, height1, width1
        if LEVELS > 2:
            if program >= first2:
                program -= first2
                source = gated_low + batch.to(tl.int64) * height1 * width1 * half
                level, rows, columns = 2, height2, width2
        blocks, across = tl.cdiv(half, CHANNELS), tl.cdiv(width, COLUMNS)
        x = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
        program = program // across
        y = program % height
        program = program // height
        channel = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
        image = (program // blocks).to(tl.int64)
        inside = (channel < half)[:, None] & (x < width)[None, :]
        left, right, share_x = neighbours(x, width, columns)
        upper, lower, share_y = neighbours(y, height, rows)
        source += (image * half + channel[:, None]) * rows * columns
        above, below = source + upper * columns, source + lower * columns
        left, right, share_x = left[None, :], right[None, :], share_x[None, :]
        # Interpolate along x first, as torch does.
        top = tl.load(above + left, mask=inside, other=0.0).to(tl.float32) * (1 - share_x)
        top += tl.load(above + right, mask=inside, other=0.0).to(tl.float32) * share_x
        low = tl.load(below + left, mask=inside, other=0.0).to(tl.float32) * (1 - share_x)
        low += tl.load(below + right, mask=inside, other=0.0).to(tl.float32) * share_x
        value = top * (1 - share_y) + low * share_y
        target = pyramid + ((image * LEVELS + level) * half + channel[:, None]) * (16 * vectors)
        target += y * width + x[None, :]
        tl.store(target, value.to(pyramid.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "vectors"])
def project_planes_kernel(
    pyramid,
    out_weight,
    context,
    result,
    tokens,
    vectors,
    inner,
    dim,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
):
    """As `project_kernel`, from pyramid [B, inner, 16 · vectors]."""
    program = tl.program_id(0)
    across, down = tl.cdiv(dim, OUTPUTS), tl.cdiv(tokens, TOKENS)
    output = (program % across) * OUTPUTS + tl.arange(0, OUTPUTS)
    program = program // across
    token = (program % down) * TOKENS + tl.arange(0, TOKENS)
    image = (program // down).to(tl.int64)
    inside_token, inside_output = token < tokens, output < dim
    position = tl.arange(0, INNER)
    line = tl.where(inside_output, output, 0)
    area = 16 * vectors
    left = pyramid + image * inner * area + position[:, None].to(tl.int64) * area + token[None, :]
    right = out_weight + line[None, :] * inner + position[:, None]
    # What lies between the last token and the end of a plane is read and never stored.
    there = (token < area)[None, :]
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(0, inner, INNER):
        if EVEN:
            a, b = tl.load(left, mask=there, other=0.0), tl.load(right)
        else:
            inside = (position < inner - start)[:, None]
            a = tl.load(left, mask=inside & there, other=0.0)
            b = tl.load(right, mask=inside, other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
        left += INNER * area.to(tl.int64)
        right += INNER
    total += tl.load(context + image * dim + output, mask=inside_output, other=0.0)[None, :]
    target = result + image * tokens * dim + token.to(tl.int64)[:, None] * dim + output[None, :]
    mask = inside_token[:, None] & inside_output[None, :]
    tl.store(target, total.to(result.dtype.element_ty), mask=mask)
