"""Gradients of the gated convolution: through the gate, to its input, to its kernel."""

# Triton cannot unpack into a tuple: it has to be concatenated.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from .depthwise import correlate, gated, locate, sigmoid


@triton.jit(do_not_specialize=["rows", "columns", "shifts"])
def gate_gradient_kernel(
    source,
    weight,
    bias,
    upstream,
    pyramid,
    convolved,
    rows,
    columns,
    channels,
    half,
    stride,
    out_stride,
    shifts,
    gain,
    KEEP: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradient upstream [B, rows, columns, stride] of a · gate(b) → convolved [·, h], of (a, b).

    The convolution is recomputed from source [B, rows, columns, h]. KEEP: its gated result is also
    stored, into pyramid [B, rows, columns, out_stride].
    """
    image, row, column, channel = locate(
        tl.program_id(0), rows, columns, half, ROWS, COLUMNS, CHANNELS
    )
    inside = channel < half
    positions = image * rows * columns
    source += positions * channels
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
            True,
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
    mask = (column < columns)[:, None] & inside[None, :]
    for i in tl.static_range(ROWS):
        y = row + i
        here = positions + y.to(tl.int64) * columns
        stored = mask & (y < rows)
        wide = column[:, None] * stride + channel[None, :]
        g = tl.load(upstream + here * stride + wide, mask=stored, other=0.0).to(tl.float32)
        if SIGMOID:
            share = sigmoid(b[i], convolved.dtype.element_ty)
            to_a, to_b = g * share, g * a[i] * share * (1 - share)
        else:
            to_a, to_b = g * (b[i] * gain), g * (a[i] * gain)
        target = convolved + here * channels + (column[:, None] * channels + channel[None, :])
        tl.store(target, to_a.to(convolved.dtype.element_ty), mask=stored)
        tl.store(target + half, to_b.to(convolved.dtype.element_ty), mask=stored)
        if KEEP:
            target = pyramid + here * out_stride + (column[:, None] * out_stride + channel[None, :])
            value = gated(a[i], b[i], gain, SIGMOID, pyramid.dtype.element_ty)
            tl.store(target, value.to(pyramid.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["rows", "columns", "shifts"])
def input_gradient_kernel(
    convolved,
    weight,
    to_source,
    rows,
    columns,
    channels,
    shifts,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """convolved [B, rows, columns, h], the convolution's gradient → to_source, its input's."""
    image, row, column, channel = locate(
        tl.program_id(0), rows, columns, channels, ROWS, COLUMNS, CHANNELS
    )
    inside = channel < channels
    positions = image * rows * columns
    total = correlate(
        convolved + positions * channels,
        *(weight, weight, False, row, column, channel, inside, rows, columns, channels, shifts),
        # pyrefly: ignore[bad-argument-type]: Triton takes True and False as constexprs
        *(True, False, K, ROWS),
    )
    offsets = column[:, None] * channels + channel[None, :]
    mask = (column < columns)[:, None] & inside[None, :]
    for i in tl.static_range(ROWS):
        y = row + i
        target = to_source + (positions + y.to(tl.int64) * columns) * channels + offsets
        tl.store(target, total[i].to(to_source.dtype.element_ty), mask=mask & (y < rows))


@triton.jit(do_not_specialize=["batch", "rows", "columns", "strips", "strip", "shifts"])
def weight_gradient_kernel(
    source,
    convolved,
    partial,
    batch,
    rows,
    columns,
    strips,
    strip,
    channels,
    shifts,
    BIASED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """source, convolved [B, rows, columns, h] → partial [B · strips, K², h], kernel gradients.

    BIASED: partial is [B · strips, K² + 1, h], with the bias's gradient in the last row. A program
    sums all K row shifts of one column shift over a strip of `strip` rows of one image. The caller
    adds the strips in a fixed order, without atomics: results are deterministic.
    """
    program = tl.program_id(0)
    # Column shifts vary fastest: they read the same strip, which stays in cache.
    dx = program % shifts
    program = program // shifts
    blocks = tl.cdiv(channels, CHANNELS)
    channel = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    image = (program // strips).to(tl.int64)
    start = (program % strips) * strip
    stop = tl.minimum(start + strip, rows)
    inside = (channel < channels)[None, :]
    source += image * rows * columns * channels
    convolved += image * rows * columns * channels
    row_stride = columns.to(tl.int64) * channels
    totals = (tl.zeros((COLUMNS, CHANNELS), tl.float32),) * K
    to_bias = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for left in range(0, columns, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        shifted = column + dx - K // 2
        here = column[:, None] * channels + channel[None, :]
        there = shifted[:, None] * channels + channel[None, :]
        inside_here = (column < columns)[:, None] & inside
        # `lines` is zero outside the result, so only the source's edge needs a mask.
        inside_there = ((shifted >= 0) & (shifted < columns))[:, None] & inside
        for top in range(start, stop, ROWS):
            lines = ()
            for i in tl.static_range(ROWS):
                y = top + i
                mask = inside_here & (y < stop)
                line = tl.load(convolved + y * row_stride + here, mask=mask, other=0.0)
                lines = lines + (line.to(tl.float32),)
                if BIASED:
                    to_bias += line.to(tl.float32)
            for i in tl.static_range(ROWS + K - 1):
                y = top + i - K // 2
                mask = inside_there & ((y >= 0) & (y < rows))
                line = tl.load(source + y * row_stride + there, mask=mask, other=0.0).to(tl.float32)
                sums = ()
                for dy in tl.static_range(K):
                    if (i >= dy) & (i < dy + ROWS):
                        sums = sums + (totals[dy] + lines[i - dy] * line,)
                    else:
                        sums = sums + (totals[dy],)
                totals = sums
    partial += ((image * strips + program % strips) * (K * K + BIASED) + dx) * channels
    for dy in tl.static_range(K):
        target = partial + dy * K * channels + channel
        tl.store(target, tl.sum(totals[dy], axis=0), mask=channel < channels)
    if BIASED:
        # Every column shift has the same sum; dx = 0 stores it.
        target = partial + K * K * channels + channel
        tl.store(target, tl.sum(to_bias, axis=0), mask=(channel < channels) & (dx == 0))
