"""Unique tokens into the predictor's sequences: context tokens to M copies, rows of a table to target tokens.

    sequence m of image b = [context of b | table[j] for j in target block m]

Forward, a program reads each context token once and stores all M copies. Backward, a program sums the M gradients of a
context token in that order. The gradient of row n of the table is the sum over all target tokens with index n. Its
program walks the list of those tokens, which a stable sort of the indices gives: the sum has one order, and each
gradient is read once for any N. (A product with a one-hot matrix would do N times the additions, on tensor cores in
16 bits only, and spread one NaN over the whole table.) All sums are fp32, without atomics.

Bytes in a type of s bytes: s W (Kc + M (Kc + Kt)) per image, forward and backward. The table, at most a megabyte or
two, stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE: dict[str, Any] = {"BLOCK_R": 32, "BLOCK_C": 128, "num_warps": 4}  # as in `patch_embed`
# Not specialised: sizes that change with the masks would compile new variants.
_SIZES = ["context_rows", "target_rows", "total_rows", "batch", "steps", "kept", "length"]


@triton.jit
def _copies(o_t, m_t, offsets, context_rows, batch, steps, kept, length, BLOCKS: tl.constexpr):
    """Locate the copies of context tokens o_t [R]: first row, distance to the next, and which tokens are real.

    Padding counts as the context of one more image without targets, so its copies follow all sequences.
    """
    if offsets is None:
        b_image = o_t // kept
        b_start = b_image * kept
        b_count = kept
        m_real = m_t
    else:
        b_image = tl.zeros_like(o_t)  # number of images that end at or before the token, by bisection
        b_high = b_image + batch
        for _ in range(steps):
            b_middle = (b_image + b_high) // 2
            m_open = b_image < b_high
            m_right = m_open & (tl.load(offsets + b_middle + 1, mask=m_open, other=0) <= o_t)
            b_image = tl.where(m_right, b_middle + 1, b_image)
            b_high = tl.where(m_right, b_high, b_middle)
        m_real = m_t & (b_image < batch)
        b_start = tl.load(offsets + b_image, mask=m_t, other=0)
        b_count = tl.load(offsets + b_image + 1, mask=m_real, other=context_rows) - b_start
    b_first = BLOCKS * (b_start + b_image * length) + o_t - b_start
    b_distance = b_count + tl.where(m_real, length, 0)
    return b_first.to(tl.int64), b_distance.to(tl.int64), m_real


@triton.jit
def _target_rows(o_g, m_g, offsets, kept, length, BLOCKS: tl.constexpr):
    """Locate target tokens o_g [R], numbered over images, blocks and tokens: their rows in the sequences."""
    b_sequence = o_g // length
    b_image = b_sequence // BLOCKS
    if offsets is None:
        b_start = b_image * kept
        b_count = kept
    else:
        b_start = tl.load(offsets + b_image, mask=m_g, other=0)
        b_count = tl.load(offsets + b_image + 1, mask=m_g, other=0) - b_start
    return (BLOCKS * b_start + (b_sequence % BLOCKS + 1) * b_count + o_g).to(tl.int64)


@triton.jit(do_not_specialize=[*_SIZES, "patches"])
def _fwd_kernel(
    context,  # [context_rows, D]
    table,  # [patches, D] in the type of `context`
    target_indices,  # [target_rows] integer
    offsets,  # [batch + 1] int32: the images' contexts, or None: `kept` tokens each
    tokens,  # [total_rows, D]
    context_rows,
    target_rows,
    total_rows,
    batch,
    steps,  # of a bisection of `batch`
    kept,
    length,  # of a block
    patches,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store all copies of BLOCK_R context tokens, or BLOCK_R target tokens; BLOCK_C columns."""
    COLUMN_BLOCKS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    i_r = tl.program_id(0) // COLUMN_BLOCKS
    o_d = (tl.program_id(0) % COLUMN_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    m_d = o_d < D
    context_programs = tl.cdiv(context_rows, BLOCK_R)
    if i_r < context_programs:
        o_t = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        m_t = o_t < context_rows
        b_first, b_distance, m_real = _copies(
            o_t, m_t, offsets, context_rows, batch, steps, kept, length, BLOCKS
        )  # fmt: skip
        b_x = tl.load(context + o_t.to(tl.int64)[:, None] * D + o_d, mask=m_real[:, None] & m_d, other=0.0)
        for i_m in tl.static_range(BLOCKS):
            b_row = b_first + i_m * b_distance
            m_row = m_t & (b_row >= 0) & (b_row < total_rows)  # whatever the offsets hold
            tl.store(tokens + b_row[:, None] * D + o_d, b_x, mask=m_row[:, None] & m_d)
    else:
        o_g = (i_r - context_programs) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_g = o_g < target_rows
        b_row = _target_rows(o_g, m_g, offsets, kept, length, BLOCKS)
        b_index = tl.load(target_indices + o_g, mask=m_g, other=0).to(tl.int64)
        m_known = (b_index >= 0) & (b_index < patches)
        b_y = tl.load(table + b_index[:, None] * D + o_d, mask=(m_g & m_known)[:, None] & m_d, other=0.0)
        b_y = tl.where(m_known[:, None], b_y, float("nan")).to(tokens.dtype.element_ty)
        m_row = m_g & (b_row >= 0) & (b_row < total_rows)
        tl.store(tokens + b_row[:, None] * D + o_d, b_y, mask=m_row[:, None] & m_d)


@triton.jit(do_not_specialize=_SIZES)
def _bwd_kernel(
    grads,  # [total_rows, D]
    offsets,  # as forward
    order,  # [target_rows] int64: the target tokens by index
    starts,  # [patches + 1] int32: where each index begins in `order`, and the end of the last
    context_grads,  # [context_rows, D]
    table_grads,  # [patches, D] fp32
    context_rows,
    target_rows,
    total_rows,
    batch,
    steps,
    kept,
    length,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the gradients of the copies of BLOCK_R context tokens, or of one row of the table; BLOCK_C columns."""
    COLUMN_BLOCKS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    i_r = tl.program_id(0) // COLUMN_BLOCKS
    o_d = (tl.program_id(0) % COLUMN_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_d = o_d < D
    context_programs = tl.cdiv(context_rows, BLOCK_R)
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    if i_r < context_programs:
        o_t = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        m_t = o_t < context_rows
        b_first, b_distance, m_real = _copies(
            o_t, m_t, offsets, context_rows, batch, steps, kept, length, BLOCKS
        )  # fmt: skip
        for i_m in tl.static_range(BLOCKS):
            b_row = b_first + i_m * b_distance
            m_row = m_real & (b_row >= 0) & (b_row < total_rows)
            mask = m_row[:, None] & m_d[None, :]
            b_sum += tl.load(grads + b_row[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        o_out = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(context_grads + o_out, b_sum.to(context_grads.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])
    else:
        i_n = i_r - context_programs
        b_end = tl.load(starts + i_n + 1)
        for i_o in range(tl.load(starts + i_n), b_end, BLOCK_R):
            o_o = i_o + tl.arange(0, BLOCK_R)
            m_g = o_o < b_end
            o_g = tl.load(order + o_o, mask=m_g, other=0)
            b_row = _target_rows(o_g, m_g, offsets, kept, length, BLOCKS)
            mask = (m_g & (b_row >= 0) & (b_row < total_rows))[:, None] & m_d[None, :]
            b_sum += tl.load(grads + b_row[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(table_grads + i_n.to(tl.int64) * D + o_d, tl.sum(b_sum, axis=0), mask=m_d)


def fwd(context: Tensor, table: Tensor, target_indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the sequences [B, M, Kc + Kt, W], or packed [M T + B M Kt, W] with `offsets`; arguments are contiguous."""
    batch, blocks, length = target_indices.shape
    kept, width = context.shape[-2:]
    sizes = _sizes(context.shape[:-1].numel(), target_indices.shape)
    shape = (batch, blocks, kept + length, width) if offsets is None else (sizes["total_rows"], width)
    given = (context, table, target_indices, offsets)
    assert all(x is None or x.is_contiguous() for x in given) and table.shape[1:] == (width,)
    tokens = torch.empty(shape, dtype=context.dtype, device=context.device)
    if tokens.numel():
        tile = {"D": width, "BLOCKS": blocks, **TILE}
        programs = _blocks(sizes["context_rows"], TILE["BLOCK_R"]) + _blocks(sizes["target_rows"], TILE["BLOCK_R"])
        with torch.cuda.device_of(context):
            _fwd_kernel[(programs * _blocks(width, TILE["BLOCK_C"]),)](
                *given, tokens, kept=kept, patches=table.shape[0], **sizes, **tile
            )
    return tokens


def bwd(
    grads: Tensor, target_indices: Tensor, offsets: Tensor | None, context_shape: Sequence[int], patches: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the context and, in fp32, of the table [patches, W]; `grads` are contiguous."""
    kept, width = context_shape[-2:]
    sizes = _sizes(math.prod(context_shape[:-1]), target_indices.shape)
    assert grads.is_contiguous() and grads.numel() == sizes["total_rows"] * width
    context_grads = torch.empty(context_shape, dtype=grads.dtype, device=grads.device)
    table_grads = torch.empty(patches, width, dtype=torch.float32, device=grads.device)
    order, starts = _by_index(target_indices.flatten(), patches)
    programs = _blocks(sizes["context_rows"], TILE["BLOCK_R"]) + patches
    tile = {"D": width, "BLOCKS": target_indices.shape[1], **TILE}
    if programs:
        with torch.cuda.device_of(grads):
            _bwd_kernel[(programs * _blocks(width, TILE["BLOCK_C"]),)](
                grads, offsets, order, starts, context_grads, table_grads, kept=kept, **sizes, **tile
            )
    return context_grads, table_grads


def _by_index(indices: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """Return the stable order [R] of indices [R], and where each of [0, patches] begins in it."""
    if patches >= torch.iinfo(indices.dtype).max:
        indices = indices.long()
    ascending, order = indices.sort(stable=True)
    bounds = torch.arange(patches + 1, dtype=indices.dtype, device=indices.device)
    return order, torch.searchsorted(ascending, bounds, out_int32=True)


def _sizes(context_rows: int, targets_shape: Sequence[int]) -> dict[str, int]:
    """Return the arguments that forward and backward share."""
    batch, blocks, length = targets_shape
    target_rows = batch * blocks * length
    total_rows = blocks * context_rows + target_rows
    assert total_rows < 2**31
    return dict(
        context_rows=context_rows, target_rows=target_rows, total_rows=total_rows,
        batch=batch, steps=batch.bit_length(), length=length,
    )  # fmt: skip


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _aot() -> list[dict[str, Any]]:
    """List the shipped tiles for ahead-of-time compilation; ":16" marks multiples of 16."""
    tiles: list[dict[str, Any]] = []
    for dtype, index, packed, blocks, width in [
        ("bf16", "i16", False, 4, 384), ("bf16", "i16", False, 4, 1152), ("bf16", "i16", True, 4, 1152),
        ("bf16", "i16", True, 1, 1152), ("fp16", "i32", False, 4, 1152), ("fp32", "i64", True, 4, 576),
    ]:  # fmt: skip
        name = f"{dtype} {index}{' packed' * packed} M={blocks} W={width}"
        sizes, absent = dict.fromkeys(_SIZES, "i32"), {} if packed else {"offsets": None}
        if packed:
            sizes["offsets"] = "*i32:16"
        pointers = dict.fromkeys(("context", "table", "tokens"), f"*{dtype}:16") | {"target_indices": f"*{index}:16"}
        constants = {"D": width, "BLOCKS": blocks, **TILE, **absent}
        signature = {**pointers, **sizes, "patches": "i32"}
        tiles.append(dict(name=f"fwd {name}", kernel=_fwd_kernel, signature=signature, constants=constants))
        pointers = dict.fromkeys(("grads", "context_grads"), f"*{dtype}:16")
        pointers |= {"order": "*i64:16", "starts": "*i32:16", "table_grads": "*fp32:16"}
        tiles.append(dict(name=f"bwd {name}", kernel=_bwd_kernel, signature={**pointers, **sizes}, constants=constants))
    return tiles


AOT = _aot()
