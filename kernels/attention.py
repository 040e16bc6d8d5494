"""Bidirectional multi-head attention for short sequences: reads the qkv projection, writes the next layer's input.

    S = Q K^T / sqrt(d),  P = softmax(S),  O = P V                                   over the keys a query sees
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(dO * O)),  dQ = dS K / sqrt(d),  dK = dS^T Q / sqrt(d)

No array of keys^2 elements leaves the chip. Bytes for X = tokens * width * element size: forward 4 X (q, k, v, o),
backward 7 X (q, k, v, dO, dq, dk, dv) if all keys fit one tile, else 8 X (also o) if the caches serve repeated reads;
both plus 4 bytes per token and head for the logarithms of the sums of weights. At 50 to 256 keys this traffic is the
bound, so each token is read as few times as the registers permit:

* forward: one program per (sequence, head, tile of queries). If all keys fit one tile, softmax is exact in one pass;
  else it runs online over tiles of keys (Milakov & Gimelshein, 2018, arXiv 1805.02867).
* backward: one launch, no atomics. If all keys fit one tile, one program per (sequence, head) keeps K, V, dK and dV on
  chip, completes dQ tile by tile, and computes rowsum(P * dP), which equals rowsum(dO * O), without reading O. Else
  each program owns a tile of tokens: first as keys, for dK and dV over all queries, then as queries, for dQ over all
  keys.

Three forms of sequences need no mask: of one length; packed, with offsets (padding follows the last sequence and gets
zeros); and structured, [context | block 1 | ... | block M], where the context sees itself, and a block the context and
itself. A head width that is no power of two is multiplied in two parts, 80 = 64 + 16 and 88 = 64 + 24, as padding to
128 would waste up to 60 %. fp32 is multiplied in fp32, without tf32: slower, but as accurate as plain torch.

Sources: Dao et al., 2022 and 2023 (FlashAttention, arXiv 2205.14135, 2307.08691).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_device import (
    accumulate,
    clear,
    exponent,
    key_places,
    load,
    product,
    row_sums,
    sequence,
    store,
    tile_rows,
    zeros,
)

PARTS = {24: (32, 0), 32: (32, 0), 64: (64, 0), 80: (64, 16), 88: (64, 32), 128: (128, 0)}  # of each head width
MAX_LENGTH = 1024  # keys of a sequence


# Not specialised: sizes that change with the masks would compile new variants.
_SIZES = ["batch", "tiles", "query_length", "length", "query_rows", "blocks", "block_length"]


@triton.jit(do_not_specialize=_SIZES)
def _fwd_kernel(
    query,  # [B, query_length, H, D] or [query_rows, H, D], rows of any stride
    key,  # [B, length, H, D] or [rows, H, D], rows of any stride
    value,  # as key
    out,  # [query_rows, H, D]
    lse,  # [H, query_rows] fp32: log2 of the sum of 2^exponent, or None
    query_offsets,  # [B + 1] int32: where packed queries begin and end, or None
    offsets,  # [B + 1] int32: the same of the keys, or None
    query_batch_stride,
    query_row_stride,
    batch_stride,  # of key and value
    row_stride,
    batch,
    tiles,  # per sequence and head
    query_length,  # of each sequence, or of the longest
    length,  # of each sequence's keys, or of the longest
    query_rows,
    blocks,
    block_length,  # None: no structure
    H: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    """Compute BLOCK_Q queries of one head of one sequence; neighbouring programs take its other heads."""
    i_h = tl.program_id(0) % H
    i_t = (tl.program_id(0) // H) % tiles
    i_b = (tl.program_id(0) // H // tiles).to(tl.int64)
    if query_offsets is not None:  # noqa: SIM102 (known at compile time)
        if i_b == batch:  # the padding behind the last sequence
            start = tl.load(query_offsets + i_b) + i_t * BLOCK_Q
            clear(out + i_h * D, start, query_rows, H * D, tiles * BLOCK_Q, D, D0, D1, BLOCK_Q)
            if lse is not None:
                for i in range(start, query_rows, tiles * BLOCK_Q):
                    o_r = i + tl.arange(0, BLOCK_Q)
                    b_zero = tl.zeros([BLOCK_Q], tl.float32)
                    tl.store(lse + i_h.to(tl.int64) * query_rows + o_r, b_zero, mask=o_r < query_rows)
            return

    i_first, q_place, q_length = sequence(  # pyright: ignore[reportGeneralTypeIssues] (jit functions are untyped)
        query_offsets, i_b, query_length, query_batch_stride, query_row_stride
    )
    _, k_place, k_length = sequence(offsets, i_b, length, batch_stride, row_stride)
    first, end, _, _, _, count, split, gap = tile_rows(i_t, q_length, k_length, length, blocks, block_length, BLOCK_Q)
    if first >= end:
        return

    to_exponent = exponent(q_length, k_length, query_length, length, blocks, block_length, D)
    o_q = first + tl.arange(0, BLOCK_Q)
    m_q = o_q < end
    o_q = o_q.to(tl.int64)
    b_q0, b_q1 = load(query + q_place + i_h * D + o_q * query_row_stride, m_q, D, D0, D1)
    p_k = key + k_place + i_h * D
    p_v = value + k_place + i_h * D
    b_o0, b_o1 = zeros(BLOCK_Q, D0, D1)
    if ONE_PASS:
        o_k, m_k = key_places(0, count, split, gap, row_stride, BLOCK_K)
        b_k0, b_k1 = load(p_k + o_k, m_k, D, D0, D1)
        b_v0, b_v1 = load(p_v + o_k, m_k, D, D0, D1)
        b_s = tl.where(m_k[None, :], product(b_q0, b_q1, b_k0, b_k1, D1) * to_exponent, float("-inf"))  # [Q, K]
        b_max = tl.where(count > 0, tl.max(b_s, axis=1), 0.0)
        b_p = tl.exp2(b_s - b_max[:, None])
        b_sum = tl.sum(b_p, axis=1)
        b_o0, b_o1 = accumulate(b_p, b_v0, b_v1, b_o0, b_o1, D1)
    else:
        b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_Q], tl.float32)
        for i in range(0, count, BLOCK_K):
            o_k, m_k = key_places(i, count, split, gap, row_stride, BLOCK_K)
            b_k0, b_k1 = load(p_k + o_k, m_k, D, D0, D1)
            b_s = tl.where(m_k[None, :], product(b_q0, b_q1, b_k0, b_k1, D1) * to_exponent, float("-inf"))  # [Q, K]
            b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_shrink = tl.exp2(b_max - b_new)
            b_p = tl.exp2(b_s - b_new[:, None])
            b_max = b_new
            b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
            b_v0, b_v1 = load(p_v + o_k, m_k, D, D0, D1)
            b_o0 *= b_shrink[:, None]
            if D1 > 0:
                b_o1 *= b_shrink[:, None]
            b_o0, b_o1 = accumulate(b_p, b_v0, b_v1, b_o0, b_o1, D1)

    b_sum = tl.where(count > 0, b_sum, 1.0)  # a query without keys gets zeros
    b_o0 /= b_sum[:, None]
    if D1 > 0:
        b_o1 /= b_sum[:, None]
    store(out + (i_first + o_q) * (H * D) + i_h * D, m_q, b_o0, b_o1, D, D0, D1)
    if lse is not None:
        tl.store(lse + i_h.to(tl.int64) * query_rows + i_first + o_q, b_max + tl.log2(b_sum), mask=m_q)


@triton.jit(do_not_specialize=[*_SIZES, "rows"])
def _bwd_kernel(
    query,  # from here to `offsets` as in the forward pass
    key,
    value,
    out,
    upstream,  # [query_rows, H, D]
    lse,
    grad_query,  # [query_rows, H, D], rows of stride grad_query_stride
    grad_key,  # [rows, H, D], rows of stride grad_stride
    grad_value,  # as grad_key
    query_offsets,
    offsets,
    query_batch_stride,
    query_row_stride,
    batch_stride,
    row_stride,
    grad_query_stride,
    grad_stride,
    batch,
    tiles,
    query_length,
    length,
    query_rows,
    rows,
    blocks,
    block_length,
    H: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    """Compute BLOCK tokens of one head of one sequence: as keys, and then, unless ONE_PASS, as queries."""
    i_h = tl.program_id(0) % H
    i_t = (tl.program_id(0) // H) % tiles
    i_b = (tl.program_id(0) // H // tiles).to(tl.int64)
    if (query_offsets is not None) or (offsets is not None):  # noqa: SIM102 (known at compile time)
        if i_b == batch:  # the padding behind the last sequence
            if query_offsets is not None:
                start = tl.load(query_offsets + i_b) + i_t * BLOCK
                clear(grad_query + i_h * D, start, query_rows, grad_query_stride, tiles * BLOCK, D, D0, D1, BLOCK)
            if offsets is not None:
                start = tl.load(offsets + i_b) + i_t * BLOCK
                clear(grad_key + i_h * D, start, rows, grad_stride, tiles * BLOCK, D, D0, D1, BLOCK)
                clear(grad_value + i_h * D, start, rows, grad_stride, tiles * BLOCK, D, D0, D1, BLOCK)
            return

    i_query, q_place, q_length = sequence(  # pyright: ignore[reportGeneralTypeIssues] (jit functions are untyped)
        query_offsets, i_b, query_length, query_batch_stride, query_row_stride
    )
    i_key, k_place, k_length = sequence(offsets, i_b, length, batch_stride, row_stride)
    first, q_end, k_end, seer, seer_end, count, split, gap = tile_rows(
        i_t, q_length, k_length, length, blocks, block_length, BLOCK
    )
    if first >= tl.maximum(q_end, k_end):
        return

    to_exponent = exponent(q_length, k_length, query_length, length, blocks, block_length, D)
    scale = 1 / D**0.5
    p_q = query + q_place + i_h * D
    p_k = key + k_place + i_h * D
    p_v = value + k_place + i_h * D
    p_o = out + i_query * (H * D) + i_h * D
    p_do = upstream + i_query * (H * D) + i_h * D
    p_lse = lse + i_h.to(tl.int64) * query_rows + i_query
    p_dq = grad_query + i_query * grad_query_stride + i_h * D
    o_own = (first + tl.arange(0, BLOCK)).to(tl.int64)

    m_k = o_own < k_end
    if not ONE_PASS:  # with more queries than keys, some tiles have queries only
        seer_end = tl.where(first < k_end, seer_end, seer)
    b_k0, b_k1 = load(p_k + o_own * row_stride, m_k, D, D0, D1)
    b_v0, b_v1 = load(p_v + o_own * row_stride, m_k, D, D0, D1)
    b_dk0, b_dk1 = zeros(BLOCK, D0, D1)
    b_dv0, b_dv1 = zeros(BLOCK, D0, D1)
    for i in range(seer, seer_end, INNER):
        o_q = (i + tl.arange(0, INNER)).to(tl.int64)
        m_q = o_q < seer_end
        b_q0, b_q1 = load(p_q + o_q * query_row_stride, m_q, D, D0, D1)
        b_do0, b_do1 = load(p_do + o_q * (H * D), m_q, D, D0, D1)
        b_lse = tl.load(p_lse + o_q, mask=m_q, other=0.0)
        b_s = product(b_k0, b_k1, b_q0, b_q1, D1) * to_exponent  # [K, Q]: the left factor stays in registers
        b_p = tl.where(m_k[:, None], tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_dv0, b_dv1 = accumulate(b_p, b_do0, b_do1, b_dv0, b_dv1, D1)
        b_dp = product(b_v0, b_v1, b_do0, b_do1, D1)
        if ONE_PASS:
            # Equals rowsum(dO * O), as all keys are here. Rounding of large logits moves rowsum(P) from 1: divide.
            b_row = tl.sum(b_p, axis=0)
            b_delta = tl.sum(b_p * b_dp, axis=0) / tl.where(b_row > 0.0, b_row, 1.0)
        else:
            b_delta = row_sums(p_o + o_q * (H * D), b_do0, b_do1, m_q, D, D0, D1)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q0.dtype)
        b_dk0, b_dk1 = accumulate(b_ds, b_q0, b_q1, b_dk0, b_dk1, D1)
        if ONE_PASS:
            b_dq0, b_dq1 = zeros(INNER, D0, D1)
            b_dq0, b_dq1 = accumulate(tl.trans(b_ds), b_k0, b_k1, b_dq0, b_dq1, D1)
            store(p_dq + o_q * grad_query_stride, m_q, b_dq0 * scale, b_dq1 * scale, D, D0, D1)
    o_grad = (i_key + o_own) * grad_stride + i_h * D
    store(grad_key + o_grad, m_k, b_dk0 * scale, b_dk1 * scale, D, D0, D1)
    store(grad_value + o_grad, m_k, b_dv0, b_dv1, D, D0, D1)

    if not ONE_PASS:
        m_q = o_own < q_end
        count = tl.where(first < q_end, count, 0)
        a_q0, a_q1 = load(p_q + o_own * query_row_stride, m_q, D, D0, D1)
        a_do0, a_do1 = load(p_do + o_own * (H * D), m_q, D, D0, D1)
        a_lse = tl.load(p_lse + o_own, mask=m_q, other=0.0)
        a_delta = row_sums(p_o + o_own * (H * D), a_do0, a_do1, m_q, D, D0, D1)
        a_dq0, a_dq1 = zeros(BLOCK, D0, D1)
        for i in range(0, count, INNER):
            o_k, m_j = key_places(i, count, split, gap, row_stride, INNER)
            a_k0, a_k1 = load(p_k + o_k, m_j, D, D0, D1)
            a_v0, a_v1 = load(p_v + o_k, m_j, D, D0, D1)
            a_p = tl.exp2(product(a_q0, a_q1, a_k0, a_k1, D1) * to_exponent - a_lse[:, None])  # [Q, K]
            a_ds = tl.where(m_j[None, :], a_p * (product(a_do0, a_do1, a_v0, a_v1, D1) - a_delta[:, None]), 0.0)
            a_dq0, a_dq1 = accumulate(a_ds, a_k0, a_k1, a_dq0, a_dq1, D1)
        store(p_dq + o_own * grad_query_stride, m_q, a_dq0 * scale, a_dq1 * scale, D, D0, D1)


class _Call(NamedTuple):
    """The arguments of a call, with q, k, v apart, and fixed lengths from the shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_offsets: Tensor | None
    offsets: Tensor | None
    batch: int
    heads: int
    query_length: int
    length: int
    blocks: int
    block_length: int

    @classmethod
    def of(
        cls, qkv: Tensor, query: Tensor | None, offsets: Tensor | None, query_offsets: Tensor | None, heads: int,
        length: int, query_length: int, blocks: int, block_length: int,
    ) -> _Call:  # fmt: skip
        if qkv.stride(-1) != 1:
            qkv = qkv.contiguous()
        if query is not None and query.stride(-1) != 1:
            query = query.contiguous()
        if query is None:
            query, key, value = qkv.chunk(3, dim=-1)
            query_offsets, query_length = offsets, length
        else:
            key, value = qkv.chunk(2, dim=-1)
        if query_offsets is None:
            query_length = query.shape[1]
        if offsets is None:
            length = key.shape[1]
        batch = key.shape[0] if offsets is None else offsets.shape[0] - 1
        return cls(
            query, key, value, query_offsets, offsets, batch, heads, query_length, length, blocks, block_length
        )  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.query.shape[-1] // self.heads

    def tiles(self, rows: int, tile: int) -> int:
        """Of one sequence; at least one, as padding is to be written even if all sequences are empty."""
        if self.blocks:
            context = self.length - self.blocks * self.block_length
            return -(-context // tile) + self.blocks * -(-self.block_length // tile)
        return max(1, -(-rows // tile))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that both kernels take."""
        first, second = PARTS[self.head_dim]
        return {
            "query": self.query, "key": self.key, "value": self.value,
            "query_offsets": self.query_offsets, "offsets": self.offsets,
            "query_batch_stride": self.query.stride(0) if self.query_offsets is None else 0,
            "query_row_stride": self.query.stride(-2),
            "batch_stride": self.key.stride(0) if self.offsets is None else 0, "row_stride": self.key.stride(-2),
            "batch": self.batch, "query_length": self.query_length, "length": self.length,
            "query_rows": self.query.shape[:-1].numel(),
            "blocks": self.blocks or None, "block_length": self.block_length if self.blocks else None,
            "H": self.heads, "D": self.head_dim, "D0": first, "D1": second,
        }  # fmt: skip


def fwd(
    qkv: Tensor, query: Tensor | None, offsets: Tensor | None, query_offsets: Tensor | None, heads: int,
    length: int, query_length: int, blocks: int, block_length: int, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output, contiguous, and the logarithms of base 2 [heads, query tokens] fp32, empty unless `with_lse`.

    Arguments as in `cjepa_fast.ops.attention`; length and query_length count for packed sides only, and blocks = 0
    means no structure.
    """
    call = _Call.of(qkv, query, offsets, query_offsets, heads, length, query_length, blocks, block_length)
    out = torch.empty(call.query.shape, dtype=qkv.dtype, device=qkv.device)
    lse_shape = (heads, out.shape[:-1].numel()) if with_lse else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=qkv.device)
    queries, keys = call.query_length, call.length
    if blocks:
        queries, keys = max(block_length, keys - blocks * block_length), keys - (blocks - 1) * block_length
    tile = _fwd_tile(call.head_dim, queries, keys, qkv.dtype != torch.float32)
    tiles = call.tiles(queries, tile["BLOCK_Q"])
    # the padding behind packed queries counts as a sequence
    programs = heads * tiles * (call.batch + (call.query_offsets is not None))
    if out.numel() and programs:
        with torch.cuda.device_of(qkv):
            _fwd_kernel[(programs,)](
                out=out, lse=lse if with_lse else None, tiles=tiles, **call.arguments(), **tile
            )  # fmt: skip
    return out, lse


def bwd(
    upstream: Tensor, qkv: Tensor, query: Tensor | None, out: Tensor, lse: Tensor,
    offsets: Tensor | None, query_offsets: Tensor | None, heads: int,
    length: int, query_length: int, blocks: int, block_length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of qkv and of query (empty without one), contiguous, from the results of `fwd`."""
    call = _Call.of(qkv, query, offsets, query_offsets, heads, length, query_length, blocks, block_length)
    grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if query is None:
        grad_query = grad.new_empty(0)
        dq, dk, dv = grad.chunk(3, dim=-1)
    else:
        grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        dq, (dk, dv) = grad_query, grad.chunk(2, dim=-1)
    tile = _bwd_tile(call.head_dim, call.length, qkv.dtype != torch.float32, blocks > 0)
    tiles = 1 if tile["ONE_PASS"] else call.tiles(max(call.query_length, call.length), tile["BLOCK"])
    # the padding behind packed sequences counts as a sequence
    programs = heads * tiles * (call.batch + (call.query_offsets is not None or offsets is not None))
    if grad.numel() + grad_query.numel() and programs:
        with torch.cuda.device_of(qkv):
            _bwd_kernel[(programs,)](
                out=out, upstream=upstream.contiguous(), lse=lse, grad_query=dq, grad_key=dk, grad_value=dv,
                grad_query_stride=dq.stride(-2), grad_stride=dk.stride(-2), tiles=tiles, rows=dk.shape[:-1].numel(),
                **{**call.arguments(), **tile},
            )  # fmt: skip
    return grad, grad_query


# Tiles: by construction; not yet tuned on a GPU. Read each token as few times as possible: all queries and keys in one
# tile where they fit. At least 64 tokens a tile, for the matrix instructions of Hopper and Blackwell. No register
# spills on sm_80, sm_90 and sm_100; sm_80 is the tightest by far.


def _fwd_tile(head_dim: int, queries: int, keys: int, half: bool) -> dict[str, Any]:
    """Return the tile for at most so many queries, and keys that a query sees, of each sequence."""
    if not half:
        size = (64, 32 if head_dim in (24, 32, 88) else 16, False, 8, 2)
    elif max(queries, keys) <= 32 and head_dim <= 64:
        size = (32, 32, True, 2, 1)
    elif keys <= 64:
        size = (64, 64, True, 4, 1)
    elif keys <= 128 and (head_dim == 128 or (queries <= 64 and head_dim <= 64)):
        size = (64, 128, True, 4, 1)
    elif keys <= 128:
        size = (128, 128, True, 8, 1)
    elif head_dim == 88:
        size = (64, 64, False, 4, 2)
    else:
        size = (128, 64, False, 8, 2)
    return dict(zip(("BLOCK_Q", "BLOCK_K", "ONE_PASS", "num_warps", "num_stages"), size, strict=True))


def _bwd_tile(head_dim: int, keys: int, half: bool, structured: bool) -> dict[str, Any]:
    """Return the tile for at most so many keys of each sequence."""
    if not half:
        size = (32, 16, False, 4 if head_dim <= 64 else 8, 2 if head_dim == 128 else 1)
    elif structured or keys > (128 if head_dim <= 64 else 64):
        size = (64, 32, False, 4 if head_dim <= 64 else 8, 2)
    elif keys <= 32 and head_dim <= 64:
        size = (32, 32, True, 2 if head_dim <= 32 else 4, 2)
    elif keys <= 64:
        size = {64: (64, 32, True, 4, 2), 128: (64, 32, True, 8, 1)}.get(
            head_dim, (64, 64 if head_dim <= 32 else 16, True, 4, 2)
        )
    else:
        size = (128, 64 if head_dim <= 32 else 32, True, 8, 2)
    tile: dict[str, Any] = dict(zip(("BLOCK", "INNER", "ONE_PASS", "num_warps", "num_stages"), size, strict=True))
    # one pass with 80 = 64 + 16 spills on sm_80, with 64 + 32 it does not
    return {**tile, "D1": 32} if head_dim == 80 and tile["ONE_PASS"] else tile


def _aot() -> list[dict[str, Any]]:
    """List the shipped tiles for ahead-of-time compilation; ":16" marks multiples of 16.

    Widths 24 and 32 share all tiles, of which 24 is the larger; packed sequences need more than fixed ones.
    """
    entries: dict[str, dict[str, Any]] = {}

    def add(kernel: Any, dtype: str, head_dim: int, tile: dict[str, Any], form: str = "packed") -> None:
        pointer, offset = f"*{dtype}:16", "*i32:16"
        backward = kernel is _bwd_kernel
        signature = dict.fromkeys(("query", "key", "value", "out"), pointer) | {"lse": "*fp32:16"}
        signature |= dict.fromkeys(("query_batch_stride", "query_row_stride", "batch_stride", "row_stride"), "i32:16")
        signature |= dict.fromkeys((*_SIZES, *(["rows"] if backward else [])), "i32")
        if backward:
            signature |= dict.fromkeys(("upstream", "grad_query", "grad_key", "grad_value"), pointer)
            signature |= dict.fromkeys(("grad_query_stride", "grad_stride"), "i32:16")
        first, second = PARTS[head_dim]
        constants: dict[str, Any] = {"H": 16, "D": head_dim, "D0": first, "D1": second, **tile}
        if form == "fixed":
            constants |= {"query_offsets": None, "offsets": None}
        else:
            signature |= {"query_offsets": offset, "offsets": offset}
        if form != "structured":
            constants |= {"blocks": None, "block_length": None}
            signature = {name: kind for name, kind in signature.items() if name not in constants}
        sizes = [str(size) for name, size in tile.items() if name.startswith(("BLOCK", "INNER"))]
        name = f"{'bwd' if backward else 'fwd'} {dtype} d={head_dim} {'x'.join(sizes)}"
        name += (" one pass" if tile["ONE_PASS"] else "") + ("" if form == "packed" else f" {form}")
        entries.setdefault(name, dict(name=name, kernel=kernel, signature=signature, constants=constants))

    for head_dim in (24, 64, 80, 88, 128):
        for keys in (32, 64, 128, 256):
            add(_fwd_kernel, "bf16", head_dim, _fwd_tile(head_dim, keys, keys, True))
            add(_bwd_kernel, "bf16", head_dim, _bwd_tile(head_dim, keys, True, False))
    for head_dim in (24, 64):
        add(_fwd_kernel, "bf16", head_dim, _fwd_tile(head_dim, 64, 128, True))
    add(_fwd_kernel, "bf16", 24, _fwd_tile(24, 128, 128, True), "structured")
    add(_bwd_kernel, "bf16", 24, _bwd_tile(24, 128, True, True), "structured")
    add(_fwd_kernel, "fp16", 64, _fwd_tile(64, 128, 128, True), "fixed")
    add(_bwd_kernel, "fp16", 64, _bwd_tile(64, 128, True, False), "fixed")
    for head_dim in (24, 64, 80, 88, 128):
        add(_fwd_kernel, "fp32", head_dim, _fwd_tile(head_dim, 128, 128, False))
        add(_bwd_kernel, "fp32", head_dim, _bwd_tile(head_dim, 128, False, False))
    return list(entries.values())


AOT = _aot()
