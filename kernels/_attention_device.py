"""Device functions of `attention`: rows in two parts, and the tokens of a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(p_row, m_row, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Load rows [R, D] as columns [0, D0) and [D0, D), padded with zeros to D0 and D1; D1 = 0: no second part."""
    o_0 = tl.arange(0, D0)[None, :]
    m_0 = m_row[:, None]
    if D0 > D:
        m_0 = m_0 & (o_0 < D)
    b_0 = tl.load(p_row[:, None] + o_0, mask=m_0, other=0.0)
    b_1 = b_0
    if D1 > 0:
        o_1 = D0 + tl.arange(0, D1)[None, :]
        m_1 = m_row[:, None]
        if D0 + D1 > D:
            m_1 = m_1 & (o_1 < D)
        b_1 = tl.load(p_row[:, None] + o_1, mask=m_1, other=0.0)
    return b_0, b_1


@triton.jit
def store(p_row, m_row, b_0, b_1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store rows in two parts, rounded to the type of the memory."""
    o_0 = tl.arange(0, D0)[None, :]
    m_0 = m_row[:, None]
    if D0 > D:
        m_0 = m_0 & (o_0 < D)
    tl.store(p_row[:, None] + o_0, b_0.to(p_row.dtype.element_ty), mask=m_0)
    if D1 > 0:
        o_1 = D0 + tl.arange(0, D1)[None, :]
        m_1 = m_row[:, None]
        if D0 + D1 > D:
            m_1 = m_1 & (o_1 < D)
        tl.store(p_row[:, None] + o_1, b_1.to(p_row.dtype.element_ty), mask=m_1)


@triton.jit
def product(a_0, a_1, b_0, b_1, D1: tl.constexpr):
    """Compute A B^T [R, C] fp32 of rows in two parts; fp32 factors are not rounded to tf32."""
    b_s = tl.dot(a_0, tl.trans(b_0), input_precision="ieee")
    if D1 > 0:
        b_s = tl.dot(a_1, tl.trans(b_1), acc=b_s, input_precision="ieee")
    return b_s


@triton.jit
def accumulate(b_p, b_0, b_1, b_acc0, b_acc1, D1: tl.constexpr):
    """Compute acc + P B for rows B in two parts, with P rounded to the type of B."""
    b_p = b_p.to(b_0.dtype)
    b_acc0 = tl.dot(b_p, b_0, acc=b_acc0, input_precision="ieee")
    if D1 > 0:
        b_acc1 = tl.dot(b_p, b_1, acc=b_acc1, input_precision="ieee")
    return b_acc0, b_acc1


@triton.jit
def zeros(R: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    b_0 = tl.zeros([R, D0], tl.float32)
    b_1 = b_0
    if D1 > 0:
        b_1 = tl.zeros([R, D1], tl.float32)
    return b_0, b_1


@triton.jit
def sequence(offsets, i_b, length, batch_stride, row_stride):
    """Return the first token of sequence i_b, its place in memory (int64 elements) and its length."""
    if offsets is None:
        i_first = i_b * length
        place = i_b * batch_stride
    else:
        start = tl.load(offsets + i_b)
        length = tl.load(offsets + i_b + 1) - start
        i_first = start.to(tl.int64)
        place = i_first * row_stride
    return i_first, place, length


@triton.jit
def tile_rows(i_t, q_length, k_length, max_length, blocks, block_length, TILE: tl.constexpr):
    """Return the tokens of tile i_t of a sequence, and what they see.

    The tile holds queries [first, q_end) and keys [first, k_end). Queries [seer, seer_end) see these keys. These
    queries see `count` keys: key j is token j before `split`, token j + gap from there on.
    """
    if block_length is None:
        first = i_t * TILE
        q_end = q_length
        k_end = k_length
        seer = 0
        seer_end = q_length
        count = k_length
        split = k_length
        gap = 0
    else:
        # tiles of the longest context first, then tiles of each block
        context_tiles = tl.cdiv(max_length - blocks * block_length, TILE)
        block_tiles = tl.cdiv(block_length, TILE)
        in_block = i_t >= context_tiles
        i_own = tl.where(in_block, i_t - context_tiles, 0)
        split = tl.maximum(k_length - blocks * block_length, 0)
        gap = tl.where(in_block, (i_own // block_tiles) * block_length, 0)
        count = tl.where(in_block, split + block_length, split)
        seer = tl.where(in_block, split + gap, 0)
        seer_end = tl.where(in_block, tl.minimum(seer + block_length, k_length), k_length)
        first = tl.where(in_block, seer + (i_own % block_tiles) * TILE, i_t * TILE)
        k_end = tl.where(in_block, seer_end, split)
        q_end = k_end
    return first, q_end, k_end, seer, seer_end, count, split, gap


@triton.jit
def exponent(q_length, k_length, query_length, length, blocks, block_length, D: tl.constexpr):
    """Return the factor from Q K^T to an exponent of 2; NaN if the sequence breaks the promise of its lengths."""
    wrong = (q_length > query_length) | (k_length > length)
    if block_length is not None:
        wrong = wrong | ((k_length > 0) & (k_length < blocks * block_length))
    return tl.where(wrong, float("nan"), 1.4426950408889634 / D**0.5)


@triton.jit
def key_places(first, count, split, gap, row_stride, BLOCK: tl.constexpr):
    """Return the places in memory of keys first + [0, BLOCK), and which of them exist."""
    o_k = first + tl.arange(0, BLOCK)
    return (o_k + tl.where(o_k >= split, gap, 0)).to(tl.int64) * row_stride, o_k < count


@triton.jit
def row_sums(p_row, b_0, b_1, m_row, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Return sums [R] fp32 over the columns of rows in memory times rows in two parts."""
    b_m0, b_m1 = load(p_row, m_row, D, D0, D1)  # pyright: ignore[reportGeneralTypeIssues]
    b_sum = tl.sum(b_m0.to(tl.float32) * b_0.to(tl.float32), axis=1)
    if D1 > 0:
        b_sum += tl.sum(b_m1.to(tl.float32) * b_1.to(tl.float32), axis=1)
    return b_sum


@triton.jit
def clear(p_rows, start, rows, row_stride, step, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr):
    """Store zeros to rows start + [0, R), then `step` further, up to `rows`."""
    b_0, b_1 = zeros(R, D0, D1)  # pyright: ignore[reportGeneralTypeIssues]
    for i in range(start, rows, step):
        o_r = i + tl.arange(0, R)
        store(p_rows + o_r.to(tl.int64) * row_stride, o_r < rows, b_0, b_1, D, D0, D1)
