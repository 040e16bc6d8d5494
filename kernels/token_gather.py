"""The token gather: kept patches into the embedding's matrix product, unique tokens into the predictor's sequences.

Patch embedding: y_t = W x_t + b + e[i_t], where x_t is patch i_t of the image of token t.
One launch reads the kept patches where they lie in the images, and no other patch. The launch writes x, an operand of
the product, and b + e[i], onto which the product accumulates, so no pass over y adds bias or positions. y is rounded
when b + e is stored and at the end; torch rounds also after b, e and W x + b. Bytes per token of C = 3 p p columns in a
type of s bytes: C (raw pixels) + s C + s D here; the product reads both and writes s D.

Predictor rows: sequence m of image b is [context of b | table[j] for j in target block m].
Forward, a program reads each context token once and stores all M copies. Backward, a program sums the M gradients of a
context token in that order. The gradient of row n of the table is the sum over all target tokens with index n. Its
program walks the list of those tokens, which a stable sort of the indices gives: the sum has one order, and each
gradient is read once for any N. (A product with a one-hot matrix would do N times the additions, on tensor cores in
16 bits only, and spread one NaN over the whole table.) Bytes: forward s W (Kc + M (Kc + Kt)) per image, backward the
same; the table of a megabyte or two stays in the cache.

All sums are fp32, without atomics.

Source: Assran et al., CVPR 2023 (arXiv 2301.08243), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


# Not specialised: sizes that change with the masks would compile new variants.
@triton.jit(do_not_specialize=["rows", "kept", "batch"])
def _patch_kernel(
    images,  # uint8 [batch, HEIGHT, WIDTH, 3] or float [batch, 3, HEIGHT, WIDTH]
    indices,  # [rows] integer, or None: all patches in order
    image_of,  # [rows] int32, -1 for padding, or None: `kept` rows of each image in order
    bias,  # [D] float
    positions,  # [patches of an image, D] float
    patches,  # [rows, 3 PATCH PATCH]
    tokens,  # [rows, D] in the type of `patches`
    rows,
    kept,
    batch,
    D: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Fill BLOCK_R rows and BLOCK_C columns of `patches` or of `tokens`."""
    RAW: tl.constexpr = images.dtype.element_ty == tl.uint8
    COLUMNS: tl.constexpr = 3 * PATCH * PATCH
    RUN: tl.constexpr = 3 * PATCH if RAW else PATCH  # contiguous elements of a patch
    LINE: tl.constexpr = 3 * WIDTH if RAW else WIDTH
    ACROSS: tl.constexpr = WIDTH // PATCH
    PATCH_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    COLUMN_BLOCKS: tl.constexpr = PATCH_BLOCKS + (D + BLOCK_C - 1) // BLOCK_C

    i_r = tl.program_id(0) // COLUMN_BLOCKS
    i_c = tl.program_id(0) % COLUMN_BLOCKS
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    m_r = o_r < rows
    b_image = o_r // kept if image_of is None else tl.load(image_of + o_r, mask=m_r, other=-1)
    m_real = m_r & (b_image != -1)
    if indices is None:
        b_index = (o_r - b_image * kept).to(tl.int64)
    else:
        b_index = tl.load(indices + o_r, mask=m_real, other=0).to(tl.int64)
    m_known = (b_index >= 0) & (b_index < (HEIGHT // PATCH) * ACROSS) & (b_image >= -1) & (b_image < batch)
    b_index = tl.where(m_known, b_index, 0).to(tl.int32)
    o_row = o_r.to(tl.int64)[:, None]

    if i_c < PATCH_BLOCKS:
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        o_patch = b_image.to(tl.int64) * (3 * HEIGHT * WIDTH)
        o_patch += (b_index // ACROSS) * (PATCH * LINE) + (b_index % ACROSS) * RUN
        o_pixel = o_c + (o_c // RUN) * (LINE - RUN)
        if not RAW:
            o_pixel += (o_c // (PATCH * PATCH)) * ((HEIGHT - PATCH) * WIDTH)
        m_c = o_c < COLUMNS
        # Rows without a patch are zero, so the product leaves `tokens` as it is.
        b_x = tl.load(images + o_patch[:, None] + o_pixel, mask=(m_real & m_known)[:, None] & m_c, other=0)
        b_x = b_x.to(tl.float32).to(patches.dtype.element_ty)
        tl.store(patches + o_row * COLUMNS + o_c, b_x, mask=m_r[:, None] & m_c)
    else:
        o_d = (i_c - PATCH_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        m_d = o_d < D
        b_bias = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
        o_position = b_index.to(tl.int64)[:, None] * D + o_d
        b_y = b_bias + tl.load(positions + o_position, mask=m_real[:, None] & m_d, other=0.0).to(tl.float32)
        # An index outside the image gives NaN.
        b_y = tl.where(m_known[:, None], tl.where(m_real[:, None], b_y, 0.0), float("nan"))
        tl.store(tokens + o_row * D + o_d, b_y.to(tokens.dtype.element_ty), mask=m_r[:, None] & m_d)


@triton.jit(do_not_specialize=["rows"])
def _column_sum_kernel(
    grads,  # [rows, D]
    image_of,  # [rows] int32, -1 for rows to leave out, or None
    partials,  # [programs along the rows, D] fp32
    rows,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum TILES * BLOCK_R rows of BLOCK_C columns."""
    COLUMN_BLOCKS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    i_p = tl.program_id(0) // COLUMN_BLOCKS
    o_d = (tl.program_id(0) % COLUMN_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_d = o_d < D
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for i in tl.static_range(TILES):
        o_r = (i_p * TILES + i) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        if image_of is not None:
            m_r &= tl.load(image_of + o_r, mask=m_r, other=-1) != -1
        mask = m_r[:, None] & m_d[None, :]
        b_sum += tl.load(grads + o_r.to(tl.int64)[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partials + i_p.to(tl.int64) * D + o_d, tl.sum(b_sum, axis=0), mask=m_d)


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


_SIZES = ["context_rows", "target_rows", "total_rows", "batch", "steps", "kept", "length"]


@triton.jit(do_not_specialize=[*_SIZES, "patches"])
def _rows_fwd_kernel(
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
def _rows_bwd_kernel(
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


def patches_and_tokens(
    images: Tensor, indices: Tensor | None, image_of: Tensor | None, bias: Tensor, positions: Tensor, patch_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the kept patches [rows, 3 p p] and bias + position [rows, D] in `dtype`; arguments are contiguous.

    `indices` is [B, K], None (all patches), or beside `image_of` [T] as many tokens.
    """
    raw = images.dtype == torch.uint8
    batch, (height, width) = images.shape[0], images.shape[1:3] if raw else images.shape[2:]
    count, embedding = positions.shape
    assert count == (height // patch_size) * (width // patch_size) and bias.shape == (embedding,)
    assert all(x is None or x.is_contiguous() for x in (images, indices, image_of, bias, positions))
    kept = count if indices is None else indices.shape[-1]
    rows = kept if image_of is not None else batch * kept
    assert rows < 2**31
    columns = 3 * patch_size**2
    gathered = torch.empty(rows, columns, dtype=dtype, device=images.device)
    tokens = torch.empty(rows, embedding, dtype=dtype, device=images.device)
    tile = {"D": embedding, "HEIGHT": height, "WIDTH": width, "PATCH": patch_size, **TILE}
    programs = _blocks(rows, TILE["BLOCK_R"]) * sum(_blocks(n, TILE["BLOCK_C"]) for n in (columns, embedding))
    if programs:
        with torch.cuda.device_of(images):
            _patch_kernel[(programs,)](
                images, indices, image_of, bias, positions, gathered, tokens, rows, kept, batch, **tile
            )
    return gathered, tokens


def column_sum(grads: Tensor, image_of: Tensor | None) -> Tensor:
    """Return the sum [D] fp32 of the rows of contiguous grads [rows, D] whose image is not -1."""
    rows, width = grads.shape
    assert rows < 2**31 and grads.is_contiguous()
    partials = torch.empty(_blocks(rows, SUM_ROWS), width, dtype=torch.float32, device=grads.device)
    programs = partials.shape[0] * _blocks(width, TILE["BLOCK_C"])
    if programs:
        with torch.cuda.device_of(grads):
            _column_sum_kernel[(programs,)](grads, image_of, partials, rows, **{"D": width, **SUM_TILE})
    return partials.sum(0)


def rows_fwd(context: Tensor, table: Tensor, target_indices: Tensor, offsets: Tensor | None) -> Tensor:
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
            _rows_fwd_kernel[(programs * _blocks(width, TILE["BLOCK_C"]),)](
                *given, tokens, kept=kept, patches=table.shape[0], **sizes, **tile
            )
    return tokens


def rows_bwd(
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
            _rows_bwd_kernel[(programs * _blocks(width, TILE["BLOCK_C"]),)](
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


# 32 elements per thread: several 16-byte accesses in flight. By construction; not yet tuned on a GPU.
TILE: dict[str, Any] = {"BLOCK_R": 32, "BLOCK_C": 128, "num_warps": 4}
SUM_TILE: dict[str, Any] = {**TILE, "TILES": 4}
SUM_ROWS = SUM_TILE["TILES"] * SUM_TILE["BLOCK_R"]


def _aot() -> list[dict[str, Any]]:
    """List the shipped tiles for ahead-of-time compilation; ":16" marks multiples of 16."""
    tiles: list[dict[str, Any]] = []

    def add(name: str, kernel: Any, signature: dict[str, str | None], **constants: Any) -> None:
        absent = {argument: None for argument, kind in signature.items() if kind is None}
        given = {argument: kind for argument, kind in signature.items() if kind is not None}
        tiles.append(dict(name=name, kernel=kernel, signature=given, constants={**absent, **constants}))

    def pointer(kind: str | None) -> str | None:
        return kind and f"*{kind}:16"

    for pixels, dtype, index, packed, patch, width in [
        ("u8", "bf16", "i16", False, 16, 768), ("u8", "bf16", None, False, 14, 1280),
        ("u8", "bf16", "i16", True, 16, 1024), ("u8", "fp16", "i32", False, 16, 384),
        ("u8", "fp32", "i64", False, 16, 192), ("fp32", "bf16", "i64", False, 16, 768),
        ("bf16", "bf16", None, False, 14, 1280),
    ]:  # fmt: skip
        signature = {
            "images": pointer(pixels), "indices": pointer(index), "image_of": pointer("i32" if packed else None),
            "bias": pointer("fp32"), "positions": pointer("fp32"), "patches": pointer(dtype), "tokens": pointer(dtype),
            "rows": "i32", "kept": "i32", "batch": "i32",
        }  # fmt: skip
        name = f"patches {pixels} {dtype} {index or 'all'}{' packed' * packed} p={patch} D={width}"
        add(name, _patch_kernel, signature, HEIGHT=224, WIDTH=224, PATCH=patch, D=width, **TILE)
    for dtype, packed, width in [
        ("bf16", False, 768), ("bf16", True, 1280), ("fp16", False, 384), ("fp32", False, 192)
    ]:  # fmt: skip
        signature = {
            "grads": pointer(dtype), "image_of": pointer("i32" if packed else None), "partials": pointer("fp32"),
            "rows": "i32",
        }  # fmt: skip
        add(f"sum {dtype}{' packed' * packed} D={width}", _column_sum_kernel, signature, D=width, **SUM_TILE)
    for dtype, index, packed, blocks, width in [
        ("bf16", "i16", False, 4, 1152), ("bf16", "i16", True, 4, 1152), ("bf16", "i16", True, 1, 1152),
        ("fp16", "i32", False, 4, 1152), ("fp32", "i64", True, 4, 576),
    ]:  # fmt: skip
        offsets, sizes = pointer("i32" if packed else None), dict.fromkeys(_SIZES, "i32")
        name = f"{dtype} {index}{' packed' * packed} M={blocks} W={width}"
        forward = {
            "context": pointer(dtype), "table": pointer(dtype), "target_indices": pointer(index), "offsets": offsets,
            "tokens": pointer(dtype), **sizes, "patches": "i32",
        }  # fmt: skip
        add(f"rows {name}", _rows_fwd_kernel, forward, D=width, BLOCKS=blocks, **TILE)
        backward = {
            "grads": pointer(dtype), "offsets": offsets, "order": pointer("i64"), "starts": pointer("i32"),
            "context_grads": pointer(dtype), "table_grads": pointer("fp32"), **sizes,
        }  # fmt: skip
        add(f"rows bwd {name}", _rows_bwd_kernel, backward, D=width, BLOCKS=blocks, **TILE)
    return tiles


AOT = _aot()
