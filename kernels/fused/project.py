"""The output projection: a matrix product whose epilogue adds the context vector."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    pyramid,
    out_weight,
    context,
    result,
    tokens,
    inner,
    dim,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
):
    """pyramid [B, tokens, inner] · out_weight [dim, inner]ᵀ + context [B, dim] → result.

    result is [B, tokens, dim]. A tile never crosses images, so its context is one row. EVEN: INNER
    divides inner.
    """
    program = tl.program_id(0)
    across, down = tl.cdiv(dim, OUTPUTS), tl.cdiv(tokens, TOKENS)
    # Output blocks vary fastest: they share the tile of tokens in cache.
    output = (program % across) * OUTPUTS + tl.arange(0, OUTPUTS)
    program = program // across
    token = (program % down) * TOKENS + tl.arange(0, TOKENS)
    image = (program // down).to(tl.int64)
    inside_token, inside_output = token < tokens, output < dim
    position = tl.arange(0, INNER)
    # Out-of-range rows read row 0, which saves a mask; they are never stored.
    row = tl.where(inside_token, token, 0)
    line = tl.where(inside_output, output, 0)
    left = pyramid + image * tokens * inner + row.to(tl.int64)[:, None] * inner + position[None, :]
    right = out_weight + line[None, :] * inner + position[:, None]
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(0, inner, INNER):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = position < inner - start
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += INNER
        right += INNER
    total += tl.load(context + image * dim + output, mask=inside_output, other=0.0)[None, :]
    target = result + image * tokens * dim + token.to(tl.int64)[:, None] * dim + output[None, :]
    mask = inside_token[:, None] & inside_output[None, :]
    tl.store(target, total.to(result.dtype.element_ty), mask=mask)
