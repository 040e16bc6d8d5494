"""Multi-head attention over packed projections: one function, several back-ends."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils.flop_counter import register_flop_formula

from cjepa_fast.ops._attention_backends import Side, attend
from cjepa_fast.ops._attention_choice import bucket, check, choose_attention


def attention(
    qkv: Tensor, heads: int, *, query: Tensor | None = None,
    offsets: Tensor | None = None, max_length: int | None = None,
    query_offsets: Tensor | None = None, max_query_length: int | None = None,
    target_blocks: tuple[int, int] | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Compute softmax(Q K^T / sqrt(d)) V for each head of each sequence, without a causal mask.

    `attention(qkv, heads)` is self-attention in sequences of one length. Beyond that:

    * `query`: queries from elsewhere, with a length of their own. qkv then holds keys and values.
    * `offsets`: packed sequences of different lengths. Sequence b is qkv[offsets[b] : offsets[b + 1]] and may be empty.
      Padding follows the last sequence; its output and gradient are zeros. With `query`, either side may be packed, by
      `query_offsets` and `offsets`. Nothing waits for the device, except in xformers.
    * `target_blocks` = (M, Kt): each sequence is [context | block 1 | ... | block M] with Kt tokens in each block. The
      context sees itself, a block sees the context and itself.

    Args:
        qkv: [B, K, 3 D] or packed [T, 3 D], of any stride between tokens: the output of nn.Linear(D, 3 D), q, k and v
            one after another, each [heads, d]. With `query`: [B, K, 2 D] or [T, 2 D], k and v.
        heads: D = heads d.
        query: [B, Kq, D] or packed [Tq, D], in qkv's dtype.
        offsets: int32 [B + 1] on qkv's device, from 0, ascending, at most T.
        max_length: an upper bound of the packed lengths. A sequence that is longer, or too short for its target blocks,
            gets NaN from the Triton and eager implementations, and is a ValueError where the host knows the lengths.
        query_offsets, max_query_length: the same for packed queries.
        target_blocks: see above; not with `query`.
        impl:
            "triton": d in 24, 32, 64, 80, 88, 128; at most 1024 keys; fp32, bf16, fp16; deterministic.
            "sdpa": torch.nn.functional.scaled_dot_product_attention. Packed sequences on a CPU and uncompiled only,
                one call each.
            "xformers": memory_efficient_attention, on a GPU. Packed sequences without target blocks; reads their
                offsets on the host.
            "eager": plain torch with materialised weights; pads packed sequences to max_length. Runs everything.
            "auto": on CUDA, the fastest in `_attention_choice.MEASURED`. Without a measurement, sdpa for plain
                sequences of one length, else Triton, else eager. On other devices, sdpa where it can run, else eager.
            The choice and its reason are logged once.

    Returns [B, K, D] or [T, D], contiguous, each token [heads, d]; with `query`, of query's shape.

    Raises UserError if impl is unknown or cannot run; ValueError if shapes, dtypes or devices do not match.
    """
    # A compiled program must hold for all lengths, so tracing must not read them.
    known = qkv.device.type == "cpu" and not torch.compiler.is_compiling()
    width = check(qkv, heads, query, offsets, max_length, query_offsets, max_query_length, target_blocks)
    packed, structured = offsets is not None or query_offsets is not None, target_blocks is not None
    longest = max_length if offsets is not None else qkv.shape[1]
    assert longest is not None
    head_dim = operator.index(width // heads)  # constant for a model: a compiler need not keep it symbolic
    backend = choose_attention(
        impl, qkv.device.type, qkv.device.index, str(qkv.dtype), head_dim, bucket(longest), packed, structured, known
    )
    if backend != "triton":
        if query is None:
            query_offsets, max_query_length = offsets, max_length
        queries, keys = Side(query_offsets, max_query_length), Side(offsets, max_length)
        return attend(backend, qkv, heads, query, queries, keys, target_blocks)
    with_lse = torch.is_grad_enabled() and (qkv.requires_grad or (query is not None and query.requires_grad))
    out, _ = _attention(
        qkv, query, offsets, query_offsets, heads, max_length or 0, max_query_length or 0, *(target_blocks or (0, 0)),
        with_lse,
    )  # fmt: skip
    return out


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
    qkv, query, *others = ctx.saved_tensors  # once: activation checkpointing recomputes the tensors here
    grad, grad_query = _attention_backward(upstream, qkv, query, *others, *ctx.sizes)
    return grad, (None if query is None else grad_query), *[None] * 8


_attention.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.cjepa.attention, get_raw=True)
def _flops(
    qkv: Tensor, query: Tensor | None, offsets: Tensor | None, query_offsets: Tensor | None, heads: int,
    max_length: int, max_query_length: int, blocks: int, block_length: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Count two products: 4 d FLOP per head and pair of query and key.

    The host reads the lengths of real packed sequences. Fake ones count as the longest, as in torch.
    """

    def lengths(tokens: Tensor, starts: Tensor | None, longest: int) -> list[int]:
        if starts is None:
            return [tokens.shape[1]] * tokens.shape[0]
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
    """Count five products to the forward pass's two, as torch does."""
    return _flops(qkv, query, *args) * 5 // 2
