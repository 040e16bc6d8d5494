"""Multi-head attention over packed projections: one function, many back-ends, and the choice among them."""

from __future__ import annotations

import functools
import importlib.util
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from cjepa_fast.errors import UserError
from cjepa_fast.ops._choice import announce, triton_obstacle

BACKENDS = ("triton", "eager", "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "xformers", "varlen")
TRITON_HEAD_DIMS = (24, 32, 64, 80, 88, 128)

# Which back-ends were fastest, forward and backward together in 16 bits, fastest first: {name of the GPU as torch gives
# it: {(tokens, head width): back-ends}}. Tokens are a bucket: its row is for sequences of up to that many keys and more
# than the next lower bucket. Rows are measurements, of which there is none yet.
TOKENS = (32, 64, 96, 128, 192, 256, 512, 1024)
MEASURED: dict[str, dict[tuple[int, int], tuple[str, ...]]] = {}


def attention(
    qkv: Tensor, heads: int, *, query: Tensor | None = None,
    offsets: Tensor | None = None, max_length: int | None = None,
    query_offsets: Tensor | None = None, max_query_length: int | None = None,
    target_blocks: tuple[int, int] | None = None, impl: str = "auto", or_auto: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(Q K^T / sqrt(d)) V for each head of each sequence, every token seeing every other: no causal mask.

    Self-attention of sequences of one length is `attention(qkv, heads)`. What else there is:

    * `query`: queries from elsewhere, with a length of their own; qkv then holds keys and values only.
    * `offsets`: packed sequences of different lengths. Sequence b is rows offsets[b] to offsets[b + 1] of qkv, and may
      be empty; rows behind the last sequence are padding, whose output and gradient are zeros. With `query`, either
      side may be packed, by `query_offsets` and `offsets`. Nothing waits for the device, so the call can be captured in
      a CUDA graph (not with impl="xformers").
    * `target_blocks` = (M, Kt): each sequence is [context | block 1 | ... | block M] with Kt rows in each block.
      Context rows see the context; rows of a block see the context and their own block.

    Args:
        qkv: [B, K, 3 D] or packed [T, 3 D], rows of any stride: the output of nn.Linear(D, 3 D), q, k and v one after
            another and each [heads, d]. With `query`: [B, K, 2 D] or [T, 2 D], k and v.
        heads: D = heads d.
        query: [B, Kq, D] or packed [Tq, D], in qkv's dtype.
        offsets: int32 [B + 1] on qkv's device, from 0, ascending, at most T.
        max_length: at least the longest sequence. A longer one is an error that shows as NaN in its output (in the
            Triton and eager implementations), as it does if a sequence is too short for its target blocks; where the
            host knows the lengths, it is a ValueError.
        query_offsets, max_query_length: the same of packed queries.
        target_blocks: see above; not with `query`.
        impl: "auto"; "triton" (d in 24, 32, 64, 80, 88, 128; at most 1024 keys; fp32, bf16, fp16; deterministic);
            "eager" (materialised softmax in plain torch, packed sequences padded to max_length; everything);
            "sdpa" (torch.nn.functional.scaled_dot_product_attention, kernel chosen by torch; packed sequences one by
            one, on a CPU and uncompiled, where the host knows their lengths), "sdpa_cudnn", "sdpa_flash",
            "sdpa_efficient" (one of its kernels; no packed sequences); "xformers" (memory_efficient_attention, reads
            offsets on the host); "varlen" (torch.nn.attention.varlen). "auto" on CUDA takes the fastest in `MEASURED`;
            without a measurement sdpa for plain sequences of one length, else Triton, else eager. On other devices
            sdpa where it can run, else eager. The choice and its reason are logged once.
        or_auto: packed sequences and target blocks that `impl` cannot run are left to "auto".

    Returns [B, K, D] or [T, D], contiguous rows [heads, d]; with `query`, of query's shape.

    Raises UserError if impl is unknown or cannot run; ValueError if shapes, dtypes or devices do not match.
    """
    # not to the compiler, whose program must hold for all lengths
    known = qkv.device.type == "cpu" and not torch.compiler.is_compiling()
    width = _check(qkv, heads, query, offsets, max_length, query_offsets, max_query_length, target_blocks)
    packed, structured = offsets is not None or query_offsets is not None, target_blocks is not None
    longest = max_length if offsets is not None else qkv.shape[1]
    assert longest is not None
    head_dim = operator.index(width // heads)  # to the compiler a constant, which it is for a model
    backend = choose_attention(
        impl, qkv.device.type, qkv.device.index, str(qkv.dtype), head_dim, _bucket(longest), packed, structured, known,
        or_auto,
    )  # fmt: skip
    if packed and backend == "sdpa":
        sides = _Side(query_offsets, max_query_length), _Side(offsets, max_length)
        return _one_by_one(qkv, heads, query, *sides, target_blocks)
    if backend == "triton":
        with_lse = torch.is_grad_enabled() and (qkv.requires_grad or (query is not None and query.requires_grad))
        out, _ = _attention(
            qkv, query, offsets, query_offsets, heads, max_length or 0, max_query_length or 0,
            *(target_blocks or (0, 0)), with_lse,
        )  # fmt: skip
        return out

    if query is None:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
        query_offsets, max_query_length = offsets, max_length
    else:
        q, (k, v) = query.unflatten(-1, (heads, -1)), qkv.unflatten(-1, (2, heads, -1)).unbind(-3)
    if not packed:
        out = _fixed(backend, q, k, v) if target_blocks is None else _structured(backend, q, k, v, *target_blocks)
    else:
        sides = _Side(query_offsets, max_query_length), _Side(offsets, max_length)
        out = _padded(q, k, v, *sides, target_blocks) if backend == "eager" else _packed(backend, q, k, v, *sides)
    return out.flatten(-2)


def require_attention(
    impl: str, device_type: str, *, dtype: torch.dtype = torch.bfloat16, head_dims: Iterable[int] = (64,),
    length: int = 1,
) -> None:  # fmt: skip
    """Raises UserError if `impl` cannot run plain attention on such tensors: to ask before a run.

    Args:
        head_dims: head widths d of all networks. length: of the longest sequence.
    """
    if impl not in ("auto", *BACKENDS):
        raise UserError(f"runtime.attention: unknown {impl!r}; known: auto, {', '.join(BACKENDS)}")
    if impl == "auto":
        return
    for head_dim in head_dims:
        if why := _obstacle(impl, device_type, str(dtype), head_dim, _bucket(length), False, False, False):
            raise UserError(f"runtime.attention: {impl} cannot run: {why}; use auto")


def _bucket(length: int) -> int:
    """The one of `TOKENS` that holds a sequence, 0 for longer ones."""
    # comparisons only, so that a compiled program stays valid for a range of lengths
    return next((tokens for tokens in TOKENS if length <= tokens), 0)


def choose_attention(
    impl: str, device: str, index: int | None, dtype: str, head_dim: int, bucket: int, packed: bool, structured: bool,
    known: bool, or_auto: bool = False,
) -> str:  # fmt: skip
    """Which back-end runs; `bucket` is the one of `TOKENS` that holds the longest sequence, 0 for longer ones, `known`
    whether the host may read the lengths of packed ones.
    """
    if impl not in ("auto", *BACKENDS):
        raise UserError(f"unknown impl {impl!r} for attention; known: auto, {', '.join(BACKENDS)}")

    def obstacle(backend: str) -> str | None:
        return _obstacle(backend, device, dtype, head_dim, bucket, packed, structured, known)

    hindrance = None if impl == "auto" else obstacle(impl)
    if hindrance and not (or_auto and (packed or structured)):
        raise UserError(f"impl={impl!r} cannot run attention: {hindrance}; take another impl or 'auto'")
    if impl != "auto" and not hindrance:
        choice, reason = impl, "asked for"
    elif device != "cuda":
        choice, reason = "eager" if obstacle("sdpa") else "sdpa", f"the tensors are on {device}"
    else:
        name = gpu_name(index)
        measured = MEASURED.get(name, {}).get((bucket, head_dim), ()) if dtype != "torch.float32" else ()
        # sdpa would copy the context for each block
        default = ("triton", "sdpa", "eager") if packed or structured else ("sdpa",)
        choice = next(backend for backend in (*measured, *default) if obstacle(backend) is None)
        if choice in measured:
            reason = f"the fastest measured on {name}"
        else:
            reason = f"no measurement for {name}"
            if choice != default[0]:
                reason += f"; {default[0]} cannot run: {obstacle(default[0])}"
    if hindrance:
        reason += f"; {impl}, asked for, cannot run: {hindrance}"
    form = ", ".join(word for word, holds in (("packed", packed), ("structured", structured)) if holds)
    announce(f"attention ({form})" if form else "attention", choice, reason)
    return choice


choose_attention._dynamo_marked_constant = True  # type: ignore[attr-defined] # see `_choice.choose`


@functools.cache
def gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def _obstacle(
    backend: str, device: str, dtype: str, head_dim: int, bucket: int, packed: bool, structured: bool, known: bool
) -> str | None:
    """Why a back-end cannot run; None if it can."""
    name = dtype.removeprefix("torch.")
    half, floats = ("bfloat16", "float16"), ("bfloat16", "float16", "float32")
    if backend == "eager":
        return None
    if backend == "triton":
        if why := triton_obstacle(device):
            return why
        if name not in floats:
            return f"dtype {dtype} is not fp32, bf16 or fp16"
        if head_dim not in TRITON_HEAD_DIMS:
            return f"head width {head_dim} is not among {', '.join(map(str, TRITON_HEAD_DIMS))}"
        return None if bucket else f"sequences are longer than {TOKENS[-1]} tokens"
    if backend.startswith("sdpa"):
        if packed and not (known and backend == "sdpa"):
            return "packed sequences would have to be padded"
        if backend == "sdpa" or (backend == "sdpa_flash" and device == "cpu"):
            return None
    elif packed and structured:
        return "packed sequences with target blocks would have to be taken apart"
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if device != "cuda":
        return f"the tensors are on {device}, not cuda"
    if name not in (floats if backend in ("sdpa_efficient", "xformers") else half):
        return f"dtype {dtype} is not {'fp32, ' if backend in ('sdpa_efficient', 'xformers') else ''}bf16 or fp16"
    if head_dim % 8:
        return f"head width {head_dim} is not a multiple of 8"
    limit = 128 if backend == "sdpa_cudnn" else 256  # of the backward pass, for all GPUs
    return f"head width {head_dim} is over {limit}" if head_dim > limit else None


def _check(
    qkv: Tensor, heads: int, query: Tensor | None, offsets: Tensor | None, max_length: int | None,
    query_offsets: Tensor | None, max_query_length: int | None, target_blocks: tuple[int, int] | None,
) -> int:  # fmt: skip
    """The width D; raises ValueError for arguments that do not fit together."""
    parts = 3 if query is None else 2
    width = qkv.shape[-1] // parts
    if heads < 1 or qkv.shape[-1] % (parts * heads):
        raise ValueError(f"the last dimension of qkv, {qkv.shape[-1]}, is not {parts} * {heads} heads * head width")
    if query is not None:
        if target_blocks is not None:
            raise ValueError("target_blocks cannot be combined with query: structured sequences are self-attention")
        if query.shape[-1] != width:
            raise ValueError(f"query {tuple(query.shape)} does not go with keys and values {tuple(qkv.shape)}")
        if (query.dtype, query.device) != (qkv.dtype, qkv.device):
            raise ValueError(
                f"query is {query.dtype} on {query.device}, keys and values are {qkv.dtype} on {qkv.device}"
            )
    elif query_offsets is not None:
        raise ValueError("query_offsets are given without query")
    sides = [("qkv", qkv, "offsets", offsets, "max_length", max_length)]
    if query is not None:
        sides.append(("query", query, "query_offsets", query_offsets, "max_query_length", max_query_length))
    batches = []
    for name, rows, offsets_name, side_offsets, length_name, length in sides:
        if rows.ndim != (3 if side_offsets is None else 2):
            wanted = "[B, K, width] without offsets" if side_offsets is None else "[T, width] with offsets"
            raise ValueError(f"{name} {tuple(rows.shape)} is not {wanted}")
        if side_offsets is None:
            batches.append(rows.shape[0])
            continue
        if side_offsets.dtype != torch.int32 or side_offsets.ndim != 1 or side_offsets.device != qkv.device:
            raise ValueError(
                f"{offsets_name} are {side_offsets.dtype} {tuple(side_offsets.shape)} on {side_offsets.device}, "
                f"not int32 [B + 1] on {qkv.device}"
            )
        if length is None or length < 0:
            raise ValueError(f"{offsets_name} need {length_name}, the longest sequence, got {length}")
        batches.append(side_offsets.shape[0] - 1)
    if batches[-1] != batches[0]:
        raise ValueError(f"qkv has {batches[0]} sequences, query {batches[-1]}")
    if target_blocks is not None:
        longest = qkv.shape[1] if offsets is None else max_length
        blocks, block_length = target_blocks
        if blocks < 1 or block_length < 1 or blocks * block_length > (longest or 0):
            raise ValueError(f"target_blocks {target_blocks} do not fit into sequences of {longest} tokens")
    return width


class _Side(NamedTuple):
    """Where queries or keys begin and end; None of both for a fixed length."""

    offsets: Tensor | None
    max_length: int | None

    def starts(self, rows: Tensor) -> tuple[Tensor, int]:
        """Offsets and longest length of either kind of rows [B, K, ...] or [T, ...]."""
        if self.offsets is not None:
            assert self.max_length is not None
            return self.offsets, self.max_length
        batch, length = rows.shape[:2]
        return torch.arange(batch + 1, dtype=torch.int32, device=rows.device) * length, length

    def flat(self, rows: Tensor) -> Tensor:
        return rows if self.offsets is not None else rows.flatten(0, 1)


def _fixed(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, Kq, heads, d] from queries of that shape, and keys and values [B, K, heads, d]."""
    if backend == "varlen":
        return _packed(backend, q, k, v, _Side(None, None), _Side(None, None))
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        return memory_efficient_attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "eager":
        return _materialised(q, k, v, 1 / math.sqrt(q.shape[-1]), None).transpose(1, 2)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    pinned = {
        "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION,
        "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    }[backend]  # fmt: skip
    with sdpa_kernel(pinned):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _structured(backend: str, q: Tensor, k: Tensor, v: Tensor, blocks: int, block_length: int) -> Tensor:
    """Two calls: the context with itself, and each block with a copy of the context and itself."""
    context = q.shape[1] - blocks * block_length
    own = [x[:, context:].unflatten(1, (blocks, block_length)) for x in (q, k, v)]  # [B, M, Kt, heads, d]
    seen = [
        torch.cat([x[:, None, :context].expand(-1, blocks, -1, -1, -1), part], dim=2).flatten(0, 1)
        for x, part in zip((k, v), own[1:], strict=True)
    ]
    out = _fixed(backend, own[0].flatten(0, 1), *seen).unflatten(0, (-1, blocks)).flatten(1, 2)
    if context == 0:
        return out
    return torch.cat([_fixed(backend, q[:, :context], k[:, :context], v[:, :context]), out], dim=1)


def _materialised(q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor, mask: Tensor | None) -> Tensor:
    """The maths, over [..., K, d]; a query whose mask is all False gets the mean of the values: of padding, zeros."""
    scores = (q @ k.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ v


def _one_by_one(
    qkv: Tensor, heads: int, query: Tensor | None, queries: _Side, keys: _Side, target_blocks: tuple[int, int] | None
) -> Tensor:
    """Packed sequences whose lengths the host knows, a call each: no work for padding."""

    def parts(rows: Tensor, side: _Side) -> Sequence[Tensor]:
        if side.offsets is None:
            return rows.unbind()
        lengths = side.offsets.diff().tolist()
        if (longest := max(lengths, default=0)) > (side.max_length or 0):
            raise ValueError(f"a sequence has {longest} rows, more than the {side.max_length} that it may have")
        # the gradient of a split is one concatenation, unlike that of slices
        return rows.split([*lengths, len(rows) - sum(lengths)])[:-1]

    def attend(rows: Tensor, own: Tensor | None) -> Tensor:
        if not len(rows):
            return rows[:, : rows.shape[1] // 3] if own is None else torch.zeros_like(own)
        own = None if own is None else own[None]
        return attention(rows[None], heads, query=own, target_blocks=target_blocks, impl="sdpa")[0]

    sequences = parts(qkv, keys)
    own = [None] * len(sequences) if query is None else parts(query, queries)
    out = [attend(*each) for each in zip(sequences, own, strict=True)]
    if query is not None and queries.offsets is None:
        return torch.stack(out)
    like = qkv[:, : qkv.shape[1] // 3] if query is None else query
    out = out or [like[:0]]  # keeps the gradient, of zeros, where there is no sequence
    return torch.cat([*out, torch.zeros_like(like[sum(map(len, out)) :])])


def _padded(
    q: Tensor, k: Tensor, v: Tensor, queries: _Side, keys: _Side, target_blocks: tuple[int, int] | None
) -> Tensor:
    """Packed sequences by plain torch: pad to the longest that may be, mask, undo; nothing waits for the device."""

    def places(side: _Side, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B, K] of each sequence, one row too far for the padding; [B, 1] lengths, and which are too long."""
        starts, limit = side.starts(rows)
        lengths = starts.diff()[:, None]
        position = torch.arange(limit, device=rows.device)
        within = torch.where(position < lengths, starts[:-1, None] + position, side.flat(rows).shape[0])
        return within, lengths, lengths > limit

    q_rows, _, q_wrong = places(queries, q)
    k_rows, k_lengths, k_wrong = places(keys, k)

    def pad(rows: Tensor, side: _Side, places: Tensor) -> Tensor:
        return F.pad(side.flat(rows), (0, 0, 0, 0, 0, 1))[places].transpose(1, 2)

    position = torch.arange(k_rows.shape[1], device=k.device)
    mask = (position < k_lengths)[:, None]  # [B, 1, K]
    wrong = q_wrong | k_wrong
    if target_blocks is not None:
        blocks, block_length = target_blocks
        context = k_lengths - blocks * block_length
        group = torch.where(position < context, -1, (position - context) // block_length)
        mask = mask & ((group[:, None] == -1) | (group[:, None] == group[:, :, None]))  # [B, K, K]
        wrong = wrong | ((k_lengths > 0) & (context < 0))
    scale = torch.where(wrong, torch.nan, 1 / math.sqrt(q.shape[-1])).to(q.dtype)[:, None, None]
    padded = pad(q, queries, q_rows), pad(k, keys, k_rows), pad(v, keys, k_rows)
    out = _materialised(*padded, scale, mask[:, None]).transpose(1, 2)  # [B, Kq, heads, d]
    flat = queries.flat(q)
    unpadded = flat.new_zeros(flat.shape[0] + 1, *flat.shape[1:]).index_put((q_rows,), out)[:-1]
    return unpadded.view(q.shape)


def _packed(backend: str, q: Tensor, k: Tensor, v: Tensor, queries: _Side, keys: _Side) -> Tensor:
    """[..., heads, d] as q: packed sequences by the libraries that know them."""
    (q_starts, q_longest), (k_starts, k_longest) = queries.starts(q), keys.starts(k)
    q_flat, k_flat, v_flat = queries.flat(q), keys.flat(k), keys.flat(v)
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        def zero_padding(rows: Tensor, side: _Side) -> Tensor:
            """Forward and backward: the library leaves rows behind the last sequence unwritten."""
            if side.offsets is None:
                return rows
            known = torch.arange(rows.shape[0], device=rows.device) < side.offsets[-1]
            return torch.where(known[:, None, None], rows, 0.0)

        q_flat, k_flat, v_flat = (
            zero_padding(x, side) for x, side in ((q_flat, queries), (k_flat, keys), (v_flat, keys))
        )
        out = varlen_attn(q_flat, k_flat, v_flat, q_starts, k_starts, q_longest, k_longest)
        assert isinstance(out, Tensor)
        return zero_padding(out, queries).view(q.shape)
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask  # pyright: ignore[reportMissingImports]

    q_lengths, k_lengths = q_starts.diff().tolist(), k_starts.diff().tolist()
    q_total, k_total = sum(q_lengths), sum(k_lengths)
    mask = BlockDiagonalMask.from_seqlens(q_lengths, k_lengths)
    out = memory_efficient_attention(q_flat[None, :q_total], k_flat[None, :k_total], v_flat[None, :k_total], mask)[0]
    return F.pad(out, (0, 0, 0, 0, 0, q_flat.shape[0] - q_total)).view(q.shape)


@torch.library.custom_op("cjepa::attention", mutates_args=())
def _attention(
    qkv: Tensor, query: Tensor | None, offsets: Tensor | None, query_offsets: Tensor | None, heads: int,
    max_length: int, max_query_length: int, blocks: int, block_length: int, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from cjepa_fast.kernels import attention as kernel

    return kernel.fwd(
        qkv, query, offsets, query_offsets, heads, max_length, max_query_length, blocks, block_length, with_lse
    )


@_attention.register_fake
def _(
    qkv: Tensor, query: Tensor | None, offsets: Tensor | None, query_offsets: Tensor | None, heads: int,
    max_length: int, max_query_length: int, blocks: int, block_length: int, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (*qkv.shape[:-1], qkv.shape[-1] // 3) if query is None else query.shape
    lse_shape = (heads, math.prod(shape[:-1])) if with_lse else (0,)
    return qkv.new_empty(shape), qkv.new_empty(lse_shape, dtype=torch.float32)


@torch.library.custom_op("cjepa::attention_backward", mutates_args=())
def _attention_backward(
    upstream: Tensor, qkv: Tensor, query: Tensor | None, out: Tensor, lse: Tensor, offsets: Tensor | None,
    query_offsets: Tensor | None, heads: int, max_length: int, max_query_length: int, blocks: int, block_length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from cjepa_fast.kernels import attention as kernel

    return kernel.bwd(
        upstream, qkv, query, out, lse, offsets, query_offsets, heads, max_length, max_query_length, blocks,
        block_length,
    )  # fmt: skip


@_attention_backward.register_fake
def _(
    upstream: Tensor, qkv: Tensor, query: Tensor | None, out: Tensor, lse: Tensor, offsets: Tensor | None,
    query_offsets: Tensor | None, heads: int, max_length: int, max_query_length: int, blocks: int, block_length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return qkv.new_empty(qkv.shape), qkv.new_empty(0 if query is None else query.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, query, offsets, query_offsets, *ctx.sizes, with_lse = inputs
    ctx.mark_non_differentiable(output[1])
    if with_lse:
        ctx.save_for_backward(qkv, query, *output, offsets, query_offsets)


def _differentiate(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, query, *others = ctx.saved_tensors  # once: activation checkpointing recomputes them here
    grad, grad_query = _attention_backward(upstream, qkv, query, *others, *ctx.sizes)
    return grad, (None if query is None else grad_query), *[None] * 8


_attention.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.cjepa.attention, get_raw=True)
def _flops(
    qkv: Tensor, query: Tensor | None, offsets: Tensor | None, query_offsets: Tensor | None, heads: int,
    max_length: int, max_query_length: int, blocks: int, block_length: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Two products, 4 d FLOP per head and pair of query and key.

    Counting real packed sequences reads their lengths on the host; fake ones count as the longest, as in torch.
    """

    def lengths(rows: Tensor, starts: Tensor | None, longest: int) -> list[int]:
        if starts is None:
            return [rows.shape[1]] * rows.shape[0]
        fake = isinstance(starts, (FakeTensor, FunctionalTensor)) or starts.device.type == "meta"
        return [longest] * (starts.shape[0] - 1) if fake else starts.diff().tolist()

    keys = lengths(qkv, offsets, max_length)
    queries = keys if query is None else lengths(query, query_offsets, max_query_length)
    pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
    if blocks:
        targets = blocks * block_length
        pairs = sum((k - targets) ** 2 + targets * (k - targets + block_length) for k in keys if k)
    width = qkv.shape[-1] // 3 if query is None else query.shape[-1]
    return 4 * width * pairs


@register_flop_formula(torch.ops.cjepa.attention_backward, get_raw=True)
def _flops_backward(
    upstream: Tensor, qkv: Tensor, query: Tensor | None, out: Tensor, lse: Tensor, *args: Any, **kwargs: Any
) -> int:
    """Five products to the forward pass's two, as torch counts attention."""
    return _flops(qkv, query, *args) * 5 // 2
