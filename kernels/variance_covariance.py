"""VICReg's variance and covariance terms of V views from one symmetric product, and their gradient from one more GEMM.

For one view Z [n, D] with column means mu, Zc = Z - mu, C = Zc^T Zc / (n - 1) and s_j = sqrt(C_jj + eps):
    std = sum_j max(0, target - s_j) / D
    cov = sum_{i != j} C_ij^2 / D = (|Zc Zc^T|_F^2 / (n - 1)^2 - sum_j C_jj^2) / D
and with their upstream gradients b, a and h_j = -[s_j < target] / (D s_j (n - 1)),
    covariance form: dZ = 4 a / (D (n - 1))   Zc (C - diag C) + Zc diag(b h)
    gram form:       dZ = 4 a / (D (n - 1)^2) (Zc Zc^T) Zc    + Zc diag(b h - 4 a diag C / (D (n - 1))).
The covariance form works on D x D and adds up over ranks; its dual works on n x n.

Passes over memory. Forward: one kernel computes a triangle of tiles of the product and centres Z on load (in fp32,
rounded once to Z's type for the tensor cores, accumulated in fp32). A second kernel adds the splits of the reduction
and writes the whole symmetric matrix in Z's type. The covariance form subtracts a provisional mean and corrects by the
mean x of the remainder, G - n x x^T. The gram form has no such correction, so a pass of its own first computes means
and variances. Backward: the kernel centres Z on load again and applies scalar and columnwise factors to the fp32
accumulator.

Memory besides the gradient: the matrix, V D^2 or V N n elements of Z's type, kept for backward; and fp32 partial tiles,
freed by the end of forward: at most 32 MB, or one view's triangle (half a matrix) if that is more.

Sources: Bardes et al., ICLR 2022 (arXiv 2105.04906), equations 1-4; Garrido et al., ICLR 2023 (arXiv 2206.02574),
theorem 3.3, for the dual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = tl.constexpr(8)  # block columns that neighbouring programs share, for the L2 cache
# fp32 as three products of TF32 halves: the error of fp32 sums. Plain TF32 keeps 11 bits.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _triangle(p):
    """Return row i <= column j of element p of an upper triangle stored by columns; exact for p < 2^20."""
    j = ((tl.sqrt_rn(p * 8.0 + 1.0) - 1.0) * 0.5).to(tl.int32)
    return p - j * (j + 1) // 2, j


@triton.jit
def _tile_of(p, tiles_m, tiles_n, TRIANGLE: tl.constexpr):
    """Return block row and column of program p: GROUP block columns at a time, row after row."""
    if TRIANGLE:
        _, j = _triangle(p)  # pyright: ignore[reportGeneralTypeIssues]
        start = j // GROUP * GROUP
        p -= start * (start + 1) // 2
        full = start  # block rows above the group's own corner
    else:
        start = p // (tiles_m * GROUP) * GROUP
        p -= start * tiles_m
        full = tiles_m
    columns = min(GROUP, tiles_n - start)
    i_m = p // columns
    i_n = p % columns
    if i_m >= full:
        i_m, i_n = _triangle(p - full * columns)  # pyright: ignore[reportGeneralTypeIssues]
        i_m += start
    return i_m, start + i_n


@triton.jit
def _centred(rows, mean, b_mean, o_o, o_k, size, end, stride, GRAM: tl.constexpr):
    """Load an operand [O, K] of the product, 0 outside: rows o (gram) or columns o (covariance) of Z - mean."""
    m_k = o_k < end
    mask = (o_o < size)[:, None] & m_k[None, :]
    if GRAM:
        b_x = tl.load(rows + o_o.to(tl.int64)[:, None] * stride + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
        b_x -= tl.load(mean + o_k, mask=m_k, other=0.0)[None, :]
    else:
        b_x = tl.load(rows + o_k.to(tl.int64)[None, :] * stride + o_o[:, None], mask=mask, other=0.0).to(tl.float32)
        b_x -= b_mean[:, None]
    return tl.where(mask, b_x, 0.0).to(rows.dtype.element_ty)


@triton.jit
def _hinge(b_var, mask, width, count, target, eps):
    """Return the sum over columns of the hinge / D, and slopes [BD]: factors of Z - mean in its gradient."""
    b_std = tl.sqrt_rn(tl.where(b_var < 0.0, 0.0, b_var) + eps)  # below 0 by rounding only
    b_loss = tl.where(mask & ~(b_std >= target), target - b_std, 0.0)  # so written, NaN stays NaN
    return tl.sum(b_loss) / width, tl.where(b_std < target, -1.0 / (b_std * width * (count - 1.0)), 0.0)


@triton.jit
def _column_kernel(
    rows,  # [n, V, D]
    terms,  # [2, V, programs] fp32: shares of std, and of -sum_j C_jj^2 / D
    mean,  # [V, D] fp32
    slopes,  # [2, V, D] fp32: factors of Z - mean in the gradients of std and cov, or None
    length,  # n
    width,
    stride_n,
    stride_v,
    stride_term,
    target,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the mean, then the variance about it, of all rows of BLOCK_D columns."""
    i_d = tl.program_id(0)
    i_v = tl.program_id(1).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_d = o_d < width
    rows += i_v * stride_v
    b_total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for n in range(0, length, BLOCK_N):
        mask = (n + o_n < length)[:, None] & m_d[None, :]
        b_total += tl.load(rows + (n + o_n)[:, None] * stride_n + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_total, axis=0) / length
    b_total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for n in range(0, length, BLOCK_N):
        mask = (n + o_n < length)[:, None] & m_d[None, :]
        b_x = tl.load(rows + (n + o_n)[:, None] * stride_n + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_x = tl.where(mask, b_x - b_mean[None, :], 0.0)
        b_total += b_x * b_x
    b_var = tl.sum(b_total, axis=0) / (length - 1)
    std, b_slope = _hinge(b_var, m_d, width, length, target, eps)
    p_term = terms + i_v * tl.num_programs(0) + i_d
    tl.store(p_term, std)
    tl.store(p_term + stride_term, -tl.sum(b_var * b_var) / width)
    o_vd = i_v * width + o_d
    tl.store(mean + o_vd, b_mean, mask=m_d)
    if slopes is not None:
        tl.store(slopes + o_vd, b_slope, mask=m_d)
        o_vd += tl.num_programs(1).to(tl.int64) * width
        tl.store(slopes + o_vd, b_var * (-4.0 / (width * (length - 1.0))), mask=m_d)


@triton.jit(do_not_specialize=["first"])  # it differs from rank to rank
def _product_kernel(
    rows,  # [N, V, D]; gram: all n rows of the global batch
    mean,  # [V, D] fp32
    partials,  # [splits, V, size] fp32: tiles, then (covariance) sums of the centred columns
    first,  # gram: this rank's first row
    size_m,  # of the product: covariance D x D, gram N x n
    size_n,
    length,  # of the reduction: covariance N, gram D
    chunk,  # of it per split
    width,
    stride_n,
    stride_v,
    stride_part,
    GRAM: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile [BLOCK, BLOCK] of one view's product, over one split of the reduction."""
    i_p = tl.program_id(0)
    i_s = tl.program_id(1)
    i_v = tl.program_id(2).to(tl.int64)
    tiles_n = tl.cdiv(size_n, BLOCK)
    i_m, i_n = _tile_of(i_p, tl.cdiv(size_m, BLOCK), tiles_n, TRIANGLE)
    o_b = tl.arange(0, BLOCK)
    o_k = tl.arange(0, BLOCK_K)
    o_m = first + i_m * BLOCK + o_b
    o_n = i_n * BLOCK + o_b
    rows += i_v * stride_v
    mean += i_v * width
    partials += (i_s * tl.num_programs(2) + i_v) * stride_part
    begin = i_s * chunk
    end = min(begin + chunk, length)
    b_mean_m = tl.zeros([BLOCK], dtype=tl.float32)
    b_mean_n = b_mean_m
    if not GRAM:
        b_mean_m = tl.load(mean + o_m, mask=o_m < width, other=0.0)
        b_mean_n = tl.load(mean + o_n, mask=o_n < width, other=0.0)

    b_g = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    same = False
    if TRIANGLE:
        same = i_m == i_n
    if same:  # both operands are one tile
        b_total = tl.zeros([BLOCK, BLOCK_K], dtype=tl.float32)
        for k in range(begin, end, BLOCK_K):
            b_m = _centred(rows, mean, b_mean_m, o_m, k + o_k, size_m, end, stride_n, GRAM)
            b_g = tl.dot(b_m, tl.trans(b_m), b_g, input_precision=PRECISION)
            if not GRAM:
                b_total += b_m.to(tl.float32)
        if not GRAM:
            p_total = partials + tl.num_programs(0).to(tl.int64) * (BLOCK * BLOCK)
            tl.store(p_total + o_m, tl.sum(b_total, axis=1))
    else:
        for k in range(begin, end, BLOCK_K):
            b_m = _centred(rows, mean, b_mean_m, o_m, k + o_k, first + size_m, end, stride_n, GRAM)
            b_n = _centred(rows, mean, b_mean_n, o_n, k + o_k, size_n, end, stride_n, GRAM)
            b_g = tl.dot(b_m, tl.trans(b_n), b_g, input_precision=PRECISION)
    tl.store(partials + i_p.to(tl.int64) * (BLOCK * BLOCK) + o_b[:, None] * BLOCK + o_b[None, :], b_g)


@triton.jit(do_not_specialize=["splits", "count"])
def _finish_kernel(
    partials,  # [splits, V, size] fp32
    terms,  # [2, V, programs] fp32: shares of std and cov
    shift,  # covariance: [V, D] fp32, the provisional mean
    matrix,  # covariance: C - diag C [V, D, D]; gram: Zc Zc^T / D [V, N, n]; or None
    mean,  # covariance: [V, D] fp32, or None
    slopes,  # covariance: [1, V, D] fp32, factor of Z - mean in the gradient of std, or None
    splits,
    size_m,
    size_n,
    width,
    count,  # n, rows of the global batch
    stride_part,
    stride_term,
    target,
    eps,
    GRAM: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BLOCK: tl.constexpr,
    SUB: tl.constexpr,
):
    """Add the splits of one square [SUB, SUB] of a tile, correct, square, store it and its mirror image."""
    PARTS: tl.constexpr = BLOCK // SUB
    i_q = tl.program_id(0)
    i_v = tl.program_id(1).to(tl.int64)
    i_p = i_q // (PARTS * PARTS)
    i_a = i_q // PARTS % PARTS
    i_b = i_q % PARTS
    i_m, i_n = _tile_of(i_p, tl.cdiv(size_m, BLOCK), tl.cdiv(size_n, BLOCK), TRIANGLE)  # pyright: ignore[reportGeneralTypeIssues]
    o_s = tl.arange(0, SUB)
    o_a = i_a * SUB + o_s
    o_b = i_b * SUB + o_s
    o_m = i_m * BLOCK + o_a
    o_n = i_n * BLOCK + o_b
    partials += i_v * stride_part
    next_split = tl.num_programs(1).to(tl.int64) * stride_part
    b_g = tl.zeros([SUB, SUB], dtype=tl.float32)
    p_g = partials + i_p.to(tl.int64) * (BLOCK * BLOCK) + o_a[:, None] * BLOCK + o_b[None, :]
    for i_s in tl.range(0, splits, loop_unroll_factor=4):
        b_g += tl.load(p_g + i_s * next_split)
    std = 0.0
    if GRAM:
        b_g /= width
        scale = width / (count - 1.0) / (count - 1.0)
    else:
        p_total = partials + (tl.num_programs(0) // (PARTS * PARTS)).to(tl.int64) * (BLOCK * BLOCK)
        b_x_m = tl.zeros([SUB], dtype=tl.float32)
        b_x_n = tl.zeros([SUB], dtype=tl.float32)
        for i_s in tl.range(0, splits, loop_unroll_factor=4):
            b_x_m += tl.load(p_total + i_s * next_split + o_m)
            b_x_n += tl.load(p_total + i_s * next_split + o_n)
        b_x_m /= count
        b_g = (b_g - b_x_m[:, None] * b_x_n[None, :]) / (count - 1.0)
        diagonal = o_m[:, None] == o_n[None, :]
        if i_m == i_n and i_a == i_b:
            m_d = o_m < width
            std, b_slope = _hinge(tl.sum(tl.where(diagonal, b_g, 0.0), axis=1), m_d, width, count, target, eps)
            if slopes is not None:
                o_vd = i_v * width + o_m
                tl.store(slopes + o_vd, b_slope, mask=m_d)
                tl.store(mean + o_vd, tl.load(shift + o_vd, mask=m_d) + b_x_m, mask=m_d)
        # Remove the diagonal before squaring: subtracting its energy afterwards would cancel.
        b_g = tl.where(diagonal, 0.0, b_g)
        scale = 1.0 / width
    mirrored = False
    if TRIANGLE:
        mirrored = i_m != i_n
        scale = tl.where(mirrored, scale * 2.0, scale)
    p_term = terms + i_v * tl.num_programs(0) + i_q
    tl.store(p_term, std)
    tl.store(p_term + stride_term, tl.sum(b_g * b_g) * scale)
    if matrix is not None:
        mask = (o_m < size_m)[:, None] & (o_n < size_n)[None, :]
        b_c = b_g.to(matrix.dtype.element_ty)
        matrix += i_v * size_m * size_n
        tl.store(matrix + o_m.to(tl.int64)[:, None] * size_n + o_n[None, :], b_c, mask=mask)
        if mirrored:
            tl.store(
                matrix + o_n.to(tl.int64)[:, None] * size_n + o_m[None, :], tl.trans(b_c), mask=tl.trans(mask)
            )  # fmt: skip


@triton.jit(do_not_specialize=["first"])
def _bwd_kernel(
    upstream,  # [2, V] fp32: gradients of std and cov
    rows,  # [N, V, D]; gram: all n rows of the global batch
    mean,  # [V, D] fp32
    matrix,  # covariance: [V, D, D]; gram: [V, N, n]
    slopes,  # covariance: [1, V, D] fp32; gram: [2, V, D]
    grads,  # [N, V, D] contiguous
    first,  # gram: this rank's first row
    size,  # N
    length,  # of the reduction: covariance D, gram n
    width,
    stride_n,
    stride_v,
    gain,  # fp32: processes that hold the same loss
    scale,  # fp32: gain times what turns the matrix into the derivative of cov
    GRAM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile [BLOCK_M, BLOCK_N] of one view's gradient."""
    i_v = tl.program_id(1).to(tl.int64)
    views = tl.num_programs(1).to(tl.int64)
    i_m, i_n = _tile_of(tl.program_id(0), tl.cdiv(size, BLOCK_M), tl.cdiv(width, BLOCK_N), False)  # pyright: ignore[reportGeneralTypeIssues]
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < size
    m_n = o_n < width
    rows += i_v * stride_v
    mean += i_v * width
    matrix += i_v * length * (size if GRAM else width)
    p_own = rows + (first + o_m).to(tl.int64)[:, None] * stride_n
    p_line = matrix + o_m.to(tl.int64)[:, None] * length
    b_mean = tl.load(mean + o_n, mask=m_n, other=0.0)

    b_g = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, length, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < length
        if GRAM:
            b_a = tl.load(p_line + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            p_b = rows + o_k.to(tl.int64)[:, None] * stride_n + o_n[None, :]
            b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0).to(tl.float32) - b_mean[None, :]
        else:
            b_a = tl.load(p_own + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_a -= tl.load(mean + o_k, mask=m_k, other=0.0)[None, :]
            p_b = matrix + o_k.to(tl.int64)[:, None] * width + o_n[None, :]
            b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        kind = matrix.dtype.element_ty
        b_g = tl.dot(b_a.to(kind), b_b.to(kind), b_g, input_precision=PRECISION)

    b_std = tl.load(upstream + i_v) * gain
    b_cov = tl.load(upstream + views + i_v)
    b_slope = tl.load(slopes + i_v * width + o_n, mask=m_n, other=0.0) * b_std
    if GRAM:
        b_slope += tl.load(slopes + (views + i_v) * width + o_n, mask=m_n, other=0.0) * (b_cov * gain)
    mask = m_m[:, None] & m_n[None, :]
    b_x = tl.load(p_own + o_n[None, :], mask=mask, other=0.0).to(tl.float32) - b_mean[None, :]
    b_g = b_g * (b_cov * scale) + b_x * b_slope[None, :]
    p_grad = grads + (o_m.to(tl.int64)[:, None] * views + i_v) * width + o_n[None, :]
    tl.store(p_grad, b_g.to(grads.dtype.element_ty), mask=mask)


def fwd(
    rows: Tensor, first: int, own: int, count: int, gram: bool, with_grad: bool, target: float, eps: float,
    add_ranks: Callable[[Tensor], Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the terms [2, V] fp32 (std, cov) of the batch of all ranks, and the tensors for `bwd`.

    Args:
        rows: [.., V, D], the last dimension contiguous. Covariance form: this rank's rows; gram form: all `count` rows
            of all ranks, of which this rank's begin at `first`.
        own: number of this rank's rows, the same on every rank.
        add_ranks: sums a tensor over ranks in place; called on every rank alike, if own < count.

    Returns the terms; C - diag C [V, D, D] or Zc Zc^T / D [V, own, count] in the rows' type; the mean [V, D] fp32; and
    the factors of Z - mean in the gradients, [1, V, D] (std) or [2, V, D] (std, cov) fp32. Without `with_grad`, all but
    the terms are empty.
    """
    _, views, width = rows.shape
    assert rows.stride(2) == 1 or width == 1
    several = own < count
    size_m, size_n, length = (own, count, width) if gram else (width, width, own)

    def real(*shape: int) -> Tensor:
        return rows.new_empty(shape, dtype=torch.float32)

    matrix = rows.new_empty((views, size_m, size_n)) if with_grad else rows.new_empty(0)
    slopes = real(1 + gram, views, width) if with_grad else real(0)
    mean = real(views, width) if with_grad or gram else real(0)
    tile, tiles, splits, group, chunk = _product_schedule(rows.dtype, size_m, size_n, length, views)
    block = tile["BLOCK"]
    flags: dict[str, Any] = {"GRAM": gram, "TRIANGLE": size_m == size_n}
    size = tiles * block**2 + (0 if gram else _cdiv(width, block) * block)
    partials = real(splits * min(group, views) * size)
    terms = real(2, views, tiles * (block // SUB) ** 2)
    with torch.cuda.device_of(rows):
        if gram:
            centre, columns = mean, real(2, views, _cdiv(width, COLUMN_TILE["BLOCK_D"]))
            _column_kernel[(columns.shape[2], views)](
                rows, columns, mean, slopes if with_grad else None, count, width,
                rows.stride(0), rows.stride(1), columns.stride(0), target, eps, **COLUMN_TILE,
            )  # fmt: skip
        else:
            centre, columns = rows[:SHIFT_ROWS].mean(dim=0, dtype=torch.float32), None
            if several:  # the same mean on every rank, so that moments about the mean add up
                add_ranks(centre)
                centre *= own / count
        for start in range(0, views, group):
            part = slice(start, start + group)
            some = rows[:, part]
            at_once = some.shape[1]
            products = partials[: splits * at_once * size].view(splits, at_once, size)
            _product_kernel[(tiles, splits, at_once)](
                some, centre[part], products, first if gram else 0, size_m, size_n, length, chunk, width,
                rows.stride(0), rows.stride(1), size, **flags, **tile,
            )  # fmt: skip
            if several and not gram:
                products = products.sum(dim=0, keepdim=True) if splits > 1 else products
                add_ranks(products)
            keep = with_grad and not gram
            _finish_kernel[(terms.shape[2], at_once)](
                products, terms[:, part], None if gram else centre[part], matrix[part] if with_grad else None,
                mean[part] if keep else None, slopes[:, part] if keep else None, products.shape[0], size_m, size_n,
                width, count, size, terms.stride(0), target, eps,
                BLOCK=block, **flags, **FINISH_TILE,
            )  # fmt: skip
    total = terms.sum(dim=-1)
    if columns is not None:
        if several:
            add_ranks(total)
        total += columns.sum(dim=-1)
    return total, matrix, mean if with_grad else real(0), slopes


def bwd(
    upstream: Tensor, rows: Tensor, first: int, own: int, count: int, gain: float,
    matrix: Tensor, mean: Tensor, slopes: Tensor,
) -> Tensor:  # fmt: skip
    """Return the gradient [own, V, D] in the rows' type from the upstream gradient [2, V] fp32, multiplied by `gain`.

    The other arguments are those of `fwd` and its results.
    """
    _, views, width = rows.shape
    gram = slopes.shape[0] == 2
    grads = rows.new_empty((own, views, width))
    scale = 4 / (count - 1) ** 2 if gram else 4 / (width * (count - 1))
    large = BWD_TILES["large"]
    tile = BWD_TILES[_size(rows.dtype, _cdiv(own, large["BLOCK_M"]) * _cdiv(width, large["BLOCK_N"]) * views)]
    tile = {"GRAM": gram, **tile}
    programs = _cdiv(own, tile["BLOCK_M"]) * _cdiv(width, tile["BLOCK_N"])
    with torch.cuda.device_of(rows):
        _bwd_kernel[(programs, views)](
            upstream.contiguous(), rows, mean, matrix, slopes, grads, first if gram else 0, own,
            count if gram else width, width, rows.stride(0), rows.stride(1), gain, gain * scale, **tile,
        )  # fmt: skip
    return grads


# Tiles and schedules: by construction; not yet tuned on a GPU.

SHIFT_ROWS = 256  # rows whose mean is subtracted provisionally: off by 1/16 sigma, which costs no digit
MULTIPROCESSORS = 132  # of an H100 or H200; a constant, so that results do not depend on the GPU
MIN_CHUNK = 256  # shortest reduction that is worth a program
STORE = 400  # cost of writing and reading a partial tile, in steps of its reduction
MAX_PARTIALS = 32 << 20  # bytes of partial tiles at a time; more only where one view alone has more

COLUMN_TILE: dict[str, Any] = {"BLOCK_N": 64, "BLOCK_D": 64, "num_warps": 4}
FINISH_TILE: dict[str, Any] = {"SUB": 64, "num_warps": 4}
SUB: int = FINISH_TILE["SUB"]
# fp32 tiles are smaller, as registers hold both halves of every operand.
PRODUCT_TILES: dict[str, dict[str, Any]] = {
    "large": {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "small": {"BLOCK": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    "fp32": {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}
BWD_TILES: dict[str, dict[str, Any]] = {
    "large": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "small": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    "fp32": {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}


def _size(dtype: torch.dtype, programs: int) -> str:
    """Return the size of tiles to take if large ones would make this many programs."""
    return "fp32" if dtype == torch.float32 else "large" if programs >= MULTIPROCESSORS // 2 else "small"


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _tiles(size_m: int, size_n: int, block: int) -> int:
    """Return the number of tiles of the product, of which a square one needs a triangle."""
    rows, columns = _cdiv(size_m, block), _cdiv(size_n, block)
    return columns * (columns + 1) // 2 if size_m == size_n else rows * columns


def _product_schedule(
    dtype: torch.dtype, size_m: int, size_n: int, length: int, views: int
) -> tuple[dict[str, Any], int, int, int, int]:
    """Return tile, tiles per view, splits of the reduction, views at a time, and steps of the reduction per split."""
    pieces = max(1, length // MIN_CHUNK)
    large = PRODUCT_TILES["large"]["BLOCK"]
    tile = PRODUCT_TILES[_size(dtype, _tiles(size_m, size_n, large) * views * pieces)]
    block = tile["BLOCK"]
    tiles = _tiles(size_m, size_n, block)
    room = MAX_PARTIALS // (4 * block**2)
    group = _cdiv(views, _cdiv(views * tiles, max(room, tiles)))
    wave = MULTIPROCESSORS * (1 if block == large else 3)  # by the registers that a program takes

    def cost(splits: int) -> float:
        return _cdiv(tiles * group * splits, wave) * (length / splits + STORE)

    splits = min(range(1, 1 + max(1, min(pieces, room // (tiles * group)))), key=cost)
    chunk = _cdiv(_cdiv(length, splits), tile["BLOCK_K"]) * tile["BLOCK_K"]
    return tile, tiles, _cdiv(length, chunk), group, chunk


def _aot() -> list[dict[str, Any]]:
    """List the shipped tiles for ahead-of-time compilation; ":16" marks multiples of 16."""
    tiles: list[dict[str, Any]] = []

    def add(name: str, kernel: Any, pointers: dict[str, str], numbers: str, constants: dict[str, Any]) -> None:
        signature = {key: f"*{kind}:16" for key, kind in pointers.items() if kind}
        signature.update({key: "i32:16" for key in numbers.split()})
        signature.update({key: "fp32" for key in ("target", "eps", "gain", "scale") if key in kernel.arg_names})
        signature.update({key: "i32" for key in ("first", "splits", "count") if key in kernel.arg_names})
        constants = {**{key: None for key, kind in pointers.items() if not kind}, **constants}
        tiles.append(dict(name=name, kernel=kernel, signature=signature, constants=constants))

    for dtype, size in [("bf16", "large"), ("bf16", "small"), ("fp16", "large"), ("fp32", "fp32")]:
        product, bwd = PRODUCT_TILES[size], BWD_TILES[size]
        for gram in (False, True):
            form = "gram" if gram else "covariance"
            name = f"{form} {dtype} {product['BLOCK']}x{product['BLOCK']}"
            pointers = {"rows": dtype, "mean": "fp32", "partials": "fp32"}
            numbers = "size_m size_n length chunk width stride_n stride_v stride_part"
            constants = {"GRAM": gram, "TRIANGLE": True, **product}
            add(f"product {name}", _product_kernel, pointers, numbers, constants)
            if gram and size == "large":
                constants = {**constants, "TRIANGLE": False}
                add(f"product {name}, ranks", _product_kernel, pointers, numbers, constants)
            if dtype != "fp16":
                keep = "" if gram else "fp32"
                pointers = {"partials": "fp32", "terms": "fp32", "matrix": dtype}
                pointers.update(shift=keep, mean=keep, slopes=keep)
                numbers = "size_m size_n width stride_part stride_term"
                constants = {"GRAM": gram, "TRIANGLE": True, "BLOCK": product["BLOCK"], **FINISH_TILE}
                add(f"finish {name}", _finish_kernel, pointers, numbers, constants)
            name = f"{form} {dtype} {bwd['BLOCK_M']}x{bwd['BLOCK_N']}"
            pointers = {"upstream": "fp32", "rows": dtype, "mean": "fp32", "matrix": dtype, "slopes": "fp32"}
            pointers.update(grads=dtype)
            numbers = "size length width stride_n stride_v"
            add(f"bwd {name}", _bwd_kernel, pointers, numbers, {"GRAM": gram, **bwd})
        if size != "small":
            pointers = {"rows": dtype, "terms": "fp32", "mean": "fp32", "slopes": "fp32"}
            numbers = "length width stride_n stride_v stride_term"
            add(f"columns {dtype}", _column_kernel, pointers, numbers, COLUMN_TILE)
    return tiles


AOT = _aot()
