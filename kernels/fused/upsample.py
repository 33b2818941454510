"""Bilinear upsampling into the pyramid, its adjoint, and the context vector beside it."""

import triton
import triton.language as tl


@triton.jit
def neighbours(index, size, coarse):
    """Index of `size` → its two source indices in `coarse` and the second one's share.

    align_corners=False in exact integers: the source position is (2·index + 1)·coarse / (2·size)
    - 1/2, never below 0.
    """
    position = tl.maximum((2 * index + 1) * coarse - size, 0)
    lower = position // (2 * size)
    share = (position % (2 * size)).to(tl.float32) / (2 * size).to(tl.float32)
    return lower, tl.minimum(lower + 1, coarse - 1), share


@triton.jit
def upsample_lines(
    program,
    source,
    target,
    height,
    width,
    rows,
    columns,
    half,
    stride,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """source [B, rows, columns, h/2] → LINES × COLUMNS positions of target [B, H, W, stride]."""
    blocks = tl.cdiv(half, CHANNELS)
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, LINES)
    channel = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    x = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    program = program // across
    image, first = (program // down).to(tl.int64), (program % down) * LINES
    left, right, share_x = neighbours(x, width, columns)
    inside = (x < width)[:, None] & (channel < half)[None, :]
    source += image * rows * columns * half
    at_left = left[:, None] * half + channel[None, :]
    at_right = right[:, None] * half + channel[None, :]
    share_x = share_x[:, None]
    offsets = x[:, None] * stride + channel[None, :]
    for i in tl.static_range(LINES):
        y = first + i
        upper, lower, share_y = neighbours(y, height, rows)
        here = inside & (y < height)
        above = source + upper * columns.to(tl.int64) * half
        below = source + lower * columns.to(tl.int64) * half
        # Interpolate along x first, as torch does.
        top = tl.load(above + at_left, mask=here, other=0.0).to(tl.float32) * (1 - share_x)
        top += tl.load(above + at_right, mask=here, other=0.0).to(tl.float32) * share_x
        low = tl.load(below + at_left, mask=here, other=0.0).to(tl.float32) * (1 - share_x)
        low += tl.load(below + at_right, mask=here, other=0.0).to(tl.float32) * share_x
        value = top * (1 - share_y) + low * share_y
        line = target + (image * height + y) * width * stride
        tl.store(line + offsets, value.to(target.dtype.element_ty), mask=here)


@triton.jit
def project_mean(
    program,
    mean,
    weight,
    bias,
    more_bias,
    context,
    dim,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """mean [B, C] · weight [C, C]ᵀ + both biases → OUTPUTS entries of context [B, C], in fp32."""
    blocks = tl.cdiv(dim, OUTPUTS)
    output = (program % blocks) * OUTPUTS + tl.arange(0, OUTPUTS)
    image = program // blocks
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for start in range(0, dim, INPUTS):
        channel = start + tl.arange(0, INPUTS)
        value = tl.load(mean + image * dim + channel, mask=channel < dim, other=0.0)
        mask = (output < dim)[:, None] & (channel < dim)[None, :]
        rows = tl.load(weight + output[:, None] * dim + channel[None, :], mask=mask, other=0.0)
        total += rows.to(tl.float32) * value[None, :]
    result = tl.sum(total, axis=1)
    result += tl.load(bias + output, mask=output < dim, other=0.0).to(tl.float32)
    result += tl.load(more_bias + output, mask=output < dim, other=0.0).to(tl.float32)
    tl.store(context + image * dim + output, result, mask=output < dim)


@triton.jit(
    do_not_specialize=[
        *("batch", "height", "width", "height1", "width1", "height2", "width2"),
        *("first2", "first_context"),
    ]
)
def upsample_kernel(
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
    first2,
    first_context,
    half,
    dim,
    LEVELS: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """gated_low → the lower levels' channels of pyramid [B, H, W, LEVELS · h/2]; mean → context."""
    program = tl.program_id(0)
    if program >= first_context:
        program = program - first_context
        project_mean(program, mean, pool_weight, pool_bias, out_bias, context, dim, OUTPUTS, INPUTS)
    elif LEVELS > 1:
        source, target, rows, columns, first = gated_low, pyramid + half, height1, width1, 0
        if LEVELS > 2:
            if program >= first2:
                source = gated_low + batch.to(tl.int64) * height1 * width1 * half
                target, rows, columns, first = pyramid + 2 * half, height2, width2, first2
        size = (height, width, rows, columns, half, LEVELS * half)
        upsample_lines(program - first, source, target, *size, LINES, COLUMNS, CHANNELS)


@triton.jit
def share_of(index, size, coarse, wanted):
    """Weight of coarse index `wanted` in the upsampled position `index`; 0 outside the map."""
    lower, upper, share = neighbours(index, size, coarse)
    held = tl.where(lower == wanted, 1 - share, 0.0) + tl.where(upper == wanted, share, 0.0)
    return tl.where((index >= 0) & (index < size), held, 0.0)


@triton.jit
def first_holder(index, size, coarse):
    """The first position of `size` with weight on coarse `index`: under a coarse step before it."""
    before = (2 * index - 1) * size - coarse
    return tl.where(before < 0, 0, before // (2 * coarse) + 1)


@triton.jit
def downsample_line(
    program,
    to_pyramid,
    upstream,
    height,
    width,
    rows,
    columns,
    reach_y,
    reach_x,
    half,
    stride,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The adjoint of `upsample_lines`: to_pyramid [B, H, W, stride] → upstream [B, ·, ·, h/2]."""
    blocks = tl.cdiv(half, CHANNELS)
    across = tl.cdiv(columns, COLUMNS)
    channel = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    line = program // across
    row = line % rows
    inside = (column < columns)[:, None] & (channel < half)[None, :]
    row_stride = width.to(tl.int64) * stride
    image = to_pyramid + (line // rows) * height * row_stride
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    start_y = first_holder(row, height, rows)
    start_x = first_holder(column, width, columns)
    for y in range(start_y, tl.minimum(start_y + reach_y, height)):
        held_y = share_of(y, height, rows, row)
        source = image + y * row_stride
        for step in range(reach_x):
            x = start_x + step
            held = held_y * share_of(x, width, columns, column)
            offsets = x[:, None] * stride + channel[None, :]
            mask = inside & (held > 0)[:, None]
            total += tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32) * held[:, None]
    offsets = column[:, None] * half + channel[None, :]
    target = upstream + line.to(tl.int64) * columns * half + offsets
    tl.store(target, total.to(upstream.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "height", "width", "rows", "columns", "reach_y", "reach_x"])
def downsample_kernel(
    to_pyramid,
    upstream,
    batch,
    height,
    width,
    rows,
    columns,
    reach_y,
    reach_x,
    half,
    stride,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """`downsample_line` of one level."""
    size = (height, width, rows, columns, reach_y, reach_x, half, stride)
    downsample_line(tl.program_id(0), to_pyramid, upstream, *size, COLUMNS, CHANNELS)
