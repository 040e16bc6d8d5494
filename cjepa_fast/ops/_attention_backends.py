"""The back-ends of attention without a kernel of ours: torch's, xformers', and plain torch.

Queries, keys and values are [B, K, heads, d], or packed [T, heads, d].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_fast.ops._attention_choice import check_blocks


class Side(NamedTuple):
    """The starts of packed queries or keys and their longest length; None and None for one length."""

    offsets: Tensor | None
    max_length: int | None

    def starts(self, tokens: Tensor) -> tuple[Tensor, int]:
        """Return offsets and longest length of either kind of tokens, [B, K, ...] or [T, ...]."""
        if self.offsets is not None:
            assert self.max_length is not None
            return self.offsets, self.max_length
        batch, length = tokens.shape[:2]
        return torch.arange(batch + 1, dtype=torch.int32, device=tokens.device) * length, length

    def flat(self, tokens: Tensor) -> Tensor:
        return tokens if self.offsets is not None else tokens.flatten(0, 1)


def attend(
    backend: str, qkv: Tensor, heads: int, query: Tensor | None, queries: Side, keys: Side,
    target_blocks: tuple[int, int] | None,
) -> Tensor:  # fmt: skip
    """Compute `attention` by "sdpa", "xformers" or "eager"; arguments as there, and checked."""
    packed = queries.offsets is not None or keys.offsets is not None
    if packed and backend == "sdpa":
        return _one_by_one(qkv, heads, query, queries, keys, target_blocks)
    q, k, v = _split(qkv, heads, query)
    if not packed:
        out = _fixed(backend, q, k, v, target_blocks)
    elif backend == "eager":
        out = _padded(q, k, v, queries, keys, target_blocks)
    else:
        out = _xformers_packed(q, k, v, queries, keys)
    return out.flatten(-2)


def _split(qkv: Tensor, heads: int, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Split projections into queries, keys and values [..., heads, d]."""
    if query is None:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
        return q, k, v
    k, v = qkv.unflatten(-1, (2, heads, -1)).unbind(-3)
    return query.unflatten(-1, (heads, -1)), k, v


def _fixed(
    backend: str, q: Tensor, k: Tensor, v: Tensor, target_blocks: tuple[int, int] | None = None
) -> Tensor:  # fmt: skip
    """Attend in sequences of one length."""
    if target_blocks is not None:
        return _structured(backend, q, k, v, *target_blocks)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        return memory_efficient_attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "eager":
        return _materialised(q, k, v, 1 / math.sqrt(q.shape[-1]), None).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _structured(backend: str, q: Tensor, k: Tensor, v: Tensor, blocks: int, block_length: int) -> Tensor:
    """Attend in two calls: the context to itself, and each block to a copy of the context and itself."""
    context = q.shape[1] - blocks * block_length
    own = [x[:, context:].unflatten(1, (blocks, block_length)) for x in (q, k, v)]  # [B, M, Kt, heads, d]
    keys, values = (
        torch.cat([x[:, None, :context].expand(-1, blocks, -1, -1, -1), part], dim=2).flatten(0, 1)
        for x, part in zip((k, v), own[1:], strict=True)
    )
    out = _fixed(backend, own[0].flatten(0, 1), keys, values).unflatten(0, (-1, blocks)).flatten(1, 2)
    if context == 0:
        return out
    return torch.cat([_fixed(backend, q[:, :context], k[:, :context], v[:, :context]), out], dim=1)


def _materialised(q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention over [..., K, d] from its formula.

    A query whose mask is all False gets the mean of the values, which is zero for padding.
    """
    scores = (q @ k.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ v


def _one_by_one(
    qkv: Tensor, heads: int, query: Tensor | None, queries: Side, keys: Side, target_blocks: tuple[int, int] | None
) -> Tensor:
    """Attend by one sdpa call for each packed sequence, of lengths that the host reads: no work for padding."""

    def parts(tokens: Tensor, side: Side) -> Sequence[Tensor]:
        if side.offsets is None:
            return tokens.unbind()
        lengths = side.offsets.diff().tolist()
        if (longest := max(lengths, default=0)) > (side.max_length or 0):
            raise ValueError(f"a sequence has {longest} tokens, more than the {side.max_length} that it may have")
        # the gradient of a split is one concatenation, unlike that of slices
        return tokens.split([*lengths, len(tokens) - sum(lengths)])[:-1]

    def one(tokens: Tensor, own: Tensor | None) -> Tensor:
        if not len(tokens):
            return tokens[:, : tokens.shape[1] // 3] if own is None else torch.zeros_like(own)
        if target_blocks is not None:
            check_blocks(target_blocks, len(tokens))
        q, k, v = _split(tokens[None], heads, None if own is None else own[None])
        return _fixed("sdpa", q, k, v, target_blocks)[0].flatten(-2)

    sequences = parts(qkv, keys)
    own = [None] * len(sequences) if query is None else parts(query, queries)
    out = [one(*each) for each in zip(sequences, own, strict=True)]
    if query is not None and queries.offsets is None:
        return torch.stack(out)
    like = qkv[:, : qkv.shape[1] // 3] if query is None else query
    out = out or [like[:0]]  # without a sequence, the gradient is zeros, not missing
    return torch.cat([*out, torch.zeros_like(like[sum(map(len, out)) :])])


def _padded(
    q: Tensor, k: Tensor, v: Tensor, queries: Side, keys: Side, target_blocks: tuple[int, int] | None
) -> Tensor:  # fmt: skip
    """Attend in packed sequences by plain torch: pad to the longest, mask, undo; nothing waits for the device."""

    def places(side: Side, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Locate each sequence's tokens [B, K], padding behind the last token; lengths [B, 1], and which exceed K."""
        starts, limit = side.starts(tokens)
        lengths = starts.diff()[:, None]
        position = torch.arange(limit, device=tokens.device)
        within = torch.where(position < lengths, starts[:-1, None] + position, side.flat(tokens).shape[0])
        return within, lengths, lengths > limit

    q_places, _, q_wrong = places(queries, q)
    k_places, k_lengths, k_wrong = places(keys, k)

    def pad(tokens: Tensor, side: Side, places: Tensor) -> Tensor:
        return F.pad(side.flat(tokens), (0, 0, 0, 0, 0, 1))[places].transpose(1, 2)

    position = torch.arange(k_places.shape[1], device=k.device)
    mask = (position < k_lengths)[:, None]  # [B, 1, K]
    wrong = q_wrong | k_wrong
    if target_blocks is not None:
        blocks, block_length = target_blocks
        context = k_lengths - blocks * block_length
        group = torch.where(position < context, -1, (position - context) // block_length)
        mask = mask & ((group[:, None] == -1) | (group[:, None] == group[:, :, None]))  # [B, K, K]
        wrong = wrong | ((k_lengths > 0) & (context < 0))
    scale = torch.where(wrong, torch.nan, 1 / math.sqrt(q.shape[-1])).to(q.dtype)[:, None, None]
    padded = pad(q, queries, q_places), pad(k, keys, k_places), pad(v, keys, k_places)
    out = _materialised(*padded, scale, mask[:, None]).transpose(1, 2)  # [B, Kq, heads, d]
    flat = queries.flat(q)
    unpadded = flat.new_zeros(flat.shape[0] + 1, *flat.shape[1:]).index_put((q_places,), out)[:-1]
    return unpadded.view(q.shape)


def _xformers_packed(q: Tensor, k: Tensor, v: Tensor, queries: Side, keys: Side) -> Tensor:
    """Attend in packed sequences by xformers, which takes their lengths from the host."""
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask  # pyright: ignore[reportMissingImports]

    q_lengths, k_lengths = queries.starts(q)[0].diff().tolist(), keys.starts(k)[0].diff().tolist()
    q_total, k_total = sum(q_lengths), sum(k_lengths)
    flat, k, v = queries.flat(q), keys.flat(k)[None, :k_total], keys.flat(v)[None, :k_total]
    mask = BlockDiagonalMask.from_seqlens(q_lengths, k_lengths)
    out = memory_efficient_attention(flat[None, :q_total], k, v, mask)[0]
    return F.pad(out, (0, 0, 0, 0, 0, flat.shape[0] - q_total)).view(q.shape)
