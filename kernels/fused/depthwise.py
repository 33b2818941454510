"""Depthwise k × k correlation of every level with its gate."""

# Triton cannot unpack into a tuple: it has to be concatenated.
# ruff: noqa: RUF005

import triton
import triton.language as tl

# Sizes change from call to call; specialized, each value would be compiled separately.
SIZES = ("batch", "height", "width", "height1", "width1", "height2", "width2")
STARTS = ("first1", "first2", "first_mean")


@triton.jit
def correlate(
    source,
    weight,
    bias,
    biased,
    row,
    column,
    channel,
    inside_channel,
    height,
    width,
    channels,
    shifts,
    FLIP: tl.constexpr,
    BIASED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """source [height, width, channels] → ROWS tiles [COLUMNS, CHANNELS] of sums in fp32.

    BIASED: the sums start at bias [channels] where `biased`, else at zero.

    `column` [COLUMNS] and `channel` [CHANNELS] index the tile, whose first row is `row`. A row of
    the source is loaded once per column shift and reused from registers for every output row:
    K + ROWS - 1 loads instead of K · ROWS. FLIP rotates the kernel by 180° (the adjoint).
    """
    row_stride = width.to(tl.int64) * channels
    lines, inside_line = (), ()
    for i in tl.static_range(K + ROWS - 1):
        y = row + (i - K // 2)
        lines = lines + (source + y * row_stride,)
        inside_line = inside_line + ((y >= 0) & (y < height),)
    lane, inside_lane = channel[None, :], inside_channel[None, :]
    start = tl.zeros((column.shape[0], channel.shape[0]), tl.float32)
    if BIASED:
        start += tl.load(bias + lane, mask=inside_lane & biased, other=0.0).to(tl.float32)
    totals = (start,) * ROWS
    # `shifts` equals K at run time: with a constant bound compilers unroll all K² taps for minutes.
    for dx in range(shifts):
        shifted = column + (dx - K // 2)
        inside = ((shifted >= 0) & (shifted < width))[:, None] & inside_lane
        offsets = shifted[:, None] * channels + lane
        if FLIP:
            taps = weight + (K * K - 1 - dx) * channels + lane
        else:
            taps = weight + dx * channels + lane
        window = ()
        for i in tl.static_range(K + ROWS - 1):
            line = tl.load(lines[i] + offsets, mask=inside & inside_line[i], other=0.0)
            window = window + (line.to(tl.float32),)
            if i >= ROWS - 1:
                tap = tl.load(taps, mask=inside_lane, other=0.0).to(tl.float32)
                sums = ()
                for j in tl.static_range(ROWS):
                    sums = sums + (totals[j] + window[i - (ROWS - 1) + j] * tap,)
                totals = sums
                if FLIP:
                    taps -= K * channels
                else:
                    taps += K * channels
    return totals


@triton.jit
def locate(
    program, height, width, lanes, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Program of a level → (image, first row, columns [COLUMNS], channels [CHANNELS])."""
    # Channel blocks vary fastest: neighbours in the grid share rows in cache.
    blocks = tl.cdiv(lanes, CHANNELS)
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, ROWS)
    channel = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    program = program // across
    return (program // down).to(tl.int64), (program % down) * ROWS, column, channel


@triton.jit
def sigmoid(x, dtype: tl.constexpr):
    """σ(x) of fp32, accurate to one unit in the last place if the result's `dtype` is fp32.

    A GPU's own exponential is off by two or three units, which 16-bit results do not show.
    """
    if dtype == tl.float32:
        x = tl.minimum(tl.maximum(-x, -87.0), 87.0)
        # exp(x) = 2ⁿ · exp(r), |r| ≤ ln 2 / 2, ln 2 in two parts (Cody and Waite), Taylor's series.
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = x - n * 0.693359375 + n * 2.12194440e-4
        series = 1 / 720 + r * (1 / 5040)
        series = 1 / 24 + r * (1 / 120 + r * series)
        series = 1 + r * (1 + r * (1 / 2 + r * (1 / 6 + r * series)))
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        result = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1 + power * series)
    else:
        result = tl.sigmoid(x)
    return result


@triton.jit
def gated(a, b, gain, SIGMOID: tl.constexpr, dtype: tl.constexpr):
    """Two halves a, b → a · σ(b), or a · b · gain; `dtype` is that of the result."""
    if SIGMOID:
        return a * sigmoid(b, dtype)
    return a * (b * gain)


@triton.jit
def finish_mean(program, partial, mean, height, width, chunks, dim, SUMS: tl.constexpr):
    """partial [B, chunks, C] → mean [B, C], SUMS channels of one image per program."""
    blocks = tl.cdiv(dim, SUMS)
    channel = (program % blocks) * SUMS + tl.arange(0, SUMS)
    image = program // blocks
    total = tl.zeros((16, SUMS), tl.float32)
    for start in range(0, chunks, 16):
        chunk = start + tl.arange(0, 16)
        sums = partial + (image * chunks + chunk)[:, None] * dim + channel[None, :]
        mask = (chunk < chunks)[:, None] & (channel < dim)[None, :]
        total += tl.load(sums, mask=mask, other=0.0)
    tokens = height.to(tl.float32) * width.to(tl.float32)
    tl.store(mean + image * dim + channel, tl.sum(total, axis=0) / tokens, mask=channel < dim)


@triton.jit(do_not_specialize=[*SIZES, *STARTS, "chunks", "shifts"])
def gated_kernel(
    u,
    low,
    weight0,
    weight1,
    weight2,
    bias0,
    bias1,
    bias2,
    pyramid,
    gated_low,
    partial,
    mean,
    batch,
    height,
    width,
    height1,
    width1,
    height2,
    width2,
    first1,
    first2,
    first_mean,
    channels,
    half,
    dim,
    chunks,
    shifts,
    gain,
    LEVELS: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Every level's convolution and gate, and the mean of x from its partial sums.

    BIASED has a bit for every level with a bias. Pointers of other biases are not read; without any
    bias they are None.

    u [B, H, W, h] goes into the first half-channels of pyramid [B, H, W, LEVELS · h/2], the levels
    of low into those of gated_low [·, h/2]; partial [B, chunks, C] into mean [B, C].
    """
    program = tl.program_id(0)
    if program >= first_mean:
        finish_mean(program - first_mean, partial, mean, height, width, chunks, dim, SUMS)
    else:
        source, weight, target = u, weight0, pyramid
        rows, columns, stride, first = height, width, LEVELS * half, 0
        if LEVELS > 1:
            if program >= first1:
                source, weight, target = low, weight1, gated_low
                rows, columns, stride, first = height1, width1, half, first1
        if LEVELS > 2:
            if program >= first2:
                skipped = batch.to(tl.int64) * height1 * width1
                source, weight, target = (
                    low + skipped * channels,
                    weight2,
                    gated_low + skipped * half,
                )
                rows, columns, stride, first = height2, width2, half, first2
        bias, biased = bias0, True
        if BIASED:
            # A missing level starts where the means start.
            level = (program >= first1).to(tl.int32) + (program >= first2).to(tl.int32)
            biased = ((BIASED >> level) & 1) != 0
            bias = tl.where(level == 0, bias0, tl.where(level == 1, bias1, bias2))
        image, row, column, channel = locate(
            program - first, rows, columns, half, ROWS, COLUMNS, CHANNELS
        )
        inside = channel < half
        source += image * rows * columns * channels
        target += image * rows * columns * stride
        # A loop over the two halves halves the compile time of two copies of the code.
        # Initialize b separately: if it aliases a, Triton drops `a = b`.
        a = (tl.zeros((COLUMNS, CHANNELS), tl.float32),) * ROWS
        b = (tl.zeros((COLUMNS, CHANNELS), tl.float32),) * ROWS
        for part in range(2):
            a = b
            lane = channel + part * half
            b = correlate(
                source,
                weight,
                bias,
                biased,
                row,
                column,
                lane,
                inside,
                rows,
                columns,
                channels,
                shifts,
                False,  # pyrefly: ignore[bad-argument-type]: Triton takes it as a constexpr
                BIASED,
                K,
                ROWS,
            )
        offsets = column[:, None] * stride + channel[None, :]
        mask = (column < columns)[:, None] & inside[None, :]
        element: tl.constexpr = target.dtype.element_ty
        for i in tl.static_range(ROWS):
            y = row + i
            value = gated(a[i], b[i], gain, SIGMOID, element).to(element)
            tl.store(
                target + y.to(tl.int64) * columns * stride + offsets, value, mask=mask & (y < rows)
            )
