"""The kept patches of an image into the embedding's matrix product.

    y_t = W x_t + b + e[i_t],  x_t = patch i_t of the image of token t

One launch reads the kept patches where they lie in the images, and no other patch. The launch writes x, an operand of
the product, and b + e[i], onto which the product accumulates, so no pass over y adds bias or positions. y is rounded
when b + e is stored and at the end; torch rounds also after b, e and W x + b.

Bytes per token of C = 3 p p columns in a type of s bytes: C (raw pixels) + s C + s D here; the product reads both and
writes s D. Positions, at most a megabyte or two, stay in the cache. The bias's gradient is a column sum in fp32 without
atomics: programs sum fixed runs of rows, then torch the programs.

Source: Assran et al., CVPR 2023 (arXiv 2301.08243), section 3.
"""

from __future__ import annotations

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
    return tiles


AOT = _aot()
