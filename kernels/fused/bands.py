"""Depthwise k × k correlation of every level with its gate, as products on tensor cores."""

# Triton cannot unpack into a tuple: it has to be concatenated.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from .depthwise import finish_mean, gated


@triton.jit
def correlate_bands(
    plane,
    band,
    start,
    y,
    at,
    inside,
    rows,
    padded,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PATCHES: tl.constexpr,
):
    """plane [rows, padded], band [K, SPAN, STEP] → ROWS tiles [PATCHES, STEP] of sums in fp32.

    A patch is ROWS rows × STEP columns of outputs; `y` [PATCHES] is its first row, `at` [PATCHES]
    its first column with the halo, `start` what the sums begin at. Row j of every patch's inputs is
    read once and multiplied by the bands of all row shifts that lead to one of its outputs.
    """
    SPAN: tl.constexpr = 2 * STEP
    reach, out = tl.arange(0, SPAN), tl.arange(0, STEP)
    left = plane + at[:, None] + reach[None, :]
    right = band + reach[:, None] * STEP + out[None, :]
    totals = (tl.zeros((PATCHES, STEP), tl.float32) + start,) * ROWS
    bands = ()
    for j in tl.static_range(K + ROWS - 1):
        line = y + (j - K // 2)
        mask = inside & (line >= 0) & (line < rows)
        source = tl.load(left + (line * padded)[:, None], mask=mask[:, None], other=0.0)
        if j < K:
            bands = bands + (tl.load(right + j * (SPAN * STEP)),)
        sums = ()
        for i in tl.static_range(ROWS):
            if (j >= i) & (j < i + K):
                sums = sums + (tl.dot(source, bands[j - i], totals[i]),)
            else:
                sums = sums + (totals[i],)
        totals = sums
    return totals


@triton.jit(
    do_not_specialize=[
        *("batch", "height", "width", "height1", "width1", "height2", "width2"),
        *("tiles", "tiles1", "tiles2", "vectors", "first1", "first2", "first_mean", "chunks"),
    ]
)
def bands_kernel(
    planes,
    bands,
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
    tiles,
    tiles1,
    tiles2,
    vectors,
    first1,
    first2,
    first_mean,
    channels,
    half,
    dim,
    chunks,
    gain,
    LEVELS: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PATCHES: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Every level's convolution and gate, and the mean of x from its partial sums.

    As `gated_kernel`, from the planes and bands of `turn_kernel` into planes: the full level into
    the first h/2 of pyramid [B, LEVELS · h/2, 16 · vectors], lower ones into gated_low
    [B, h/2, ·, ·]. A program has PATCHES patches of one channel and of its gate's.
    """
    program = tl.program_id(0)
    if program >= first_mean:
        finish_mean(program - first_mean, partial, mean, height, width, chunks, dim, SUMS)
    else:
        source, target, level, first = planes, pyramid, 0, 0
        rows, columns, across = height, width, tiles
        area, lines = 16 * vectors, LEVELS * half
        bias, biased = bias0, True
        if LEVELS > 1:
            if program >= first1:
                source = planes + batch.to(tl.int64) * channels * height * ((tiles + 1) * STEP)
                target, level, first = gated_low, 1, first1
                rows, columns, across = height1, width1, tiles1
                area, lines = height1 * width1, half
        if LEVELS > 2:
            if program >= first2:
                source += batch.to(tl.int64) * channels * height1 * ((tiles1 + 1) * STEP)
                target = gated_low + batch.to(tl.int64) * half * height1 * width1
                level, first = 2, first2
                rows, columns, across = height2, width2, tiles2
                area = height2 * width2
        if BIASED:
            biased = ((BIASED >> level) & 1) != 0
            bias = tl.where(level == 0, bias0, tl.where(level == 1, bias1, bias2))
        program -= first
        padded = (across + 1) * STEP
        # Patches side by side fill a row of the map, and those that are left go below.
        wide = tl.minimum(across, PATCHES)
        high = PATCHES // wide
        patch = tl.arange(0, PATCHES)
        blocks = tl.cdiv(across, wide)
        tile = (program % blocks) * wide + patch % wide
        program = program // blocks
        down = tl.cdiv(rows, high * ROWS)
        y = ((program % down) * high + patch // wide) * ROWS
        program = program // down
        channel, image = program % half, (program // half).to(tl.int64)
        inside = (patch < high * wide) & (tile < across)
        a = (tl.zeros((PATCHES, STEP), tl.float32),) * ROWS
        b = (tl.zeros((PATCHES, STEP), tl.float32),) * ROWS
        # A loop and two values to begin with, for the reasons given in `gated_kernel`.
        for part in range(2):
            a = b
            lane = channel + part * half
            plane = source + (image * channels + lane) * rows * padded
            band = bands + (level * channels + lane).to(tl.int64) * (K * 2 * STEP * STEP)
            start = 0.0
            if BIASED:
                start = tl.load(bias + lane, mask=biased, other=0.0).to(tl.float32)
            size = (inside, rows, padded)
            b = correlate_bands(plane, band, start, y, tile * STEP, *size, K, ROWS, STEP, PATCHES)
        column = tile[:, None] * STEP + tl.arange(0, STEP)[None, :]
        target += (image * lines + channel) * area
        mask = inside[:, None] & (column < columns)
        element: tl.constexpr = pyramid.dtype.element_ty
        for i in tl.static_range(ROWS):
            line = (y + i)[:, None]
            value = gated(a[i], b[i], gain, SIGMOID, element).to(element)
            tl.store(target + line * columns + column, value, mask=mask & (line < rows))
