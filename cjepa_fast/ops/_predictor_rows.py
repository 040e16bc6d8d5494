"""The gather of unique tokens into the predictor's sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cjepa_fast.ops._checks import check_tensors, contiguous, unsupported
from cjepa_fast.ops._choice import choose


def predictor_rows(
    context: Tensor, table: Tensor, target_indices: Tensor, *, offsets: Tensor | None = None, total: int | None = None,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Gather unique tokens into the predictor's sequences: for each image and block [context | table[block]].

    The M sequences of an image share its context, and all images share the mask token of a position (the table).
    Whatever acts on each token alone, such as a norm or a projection, can so precede the gather and run once per unique
    token. For one sequence per image (a shared context), give all target tokens as one block, [B, 1, M Kt].

    For an index outside [0, N), the eager implementation raises, and the Triton one makes the token NaN.

    Args:
        context: [B, Kc, W]; packed [T, W].
        table: [N, W], in the context's dtype.
        target_indices: integer (16, 32 or 64 bits) [B, M, Kt], rows of the table.
        offsets: int32 [B + 1], packed mode: the context of image b is context[offsets[b] : offsets[b + 1]], with
            offsets[0] = 0 and offsets[B] <= T. Padding follows from offsets[B] on.
        total: Kc + Kt, or packed M T + B M Kt, for a compiler of dynamic shapes, which cannot divide by a sum.
        impl: see `cjepa_fast.ops`. The Triton kernel takes fp32, bf16 and fp16 and is deterministic: the gradient of
            a row of the table is the fp32 sum over its copies, in one order.

    Returns [B, M, Kc + Kt, W]; packed [M T + B M Kt, W], sequence s = b M + m behind sequence s - 1, where
    `sequence_offsets` gives their starts, and zeros behind the last.

    Raises UserError if impl is unknown or cannot run, ValueError if shapes, dtypes or devices do not match.
    """
    batch, width = len(target_indices), context.shape[-1]
    if target_indices.ndim != 3 or context.ndim != (3 if offsets is None else 2) or table.shape[1:] != (width,):
        raise ValueError(
            f"context {tuple(context.shape)}, table {tuple(table.shape)} and target_indices "
            f"{tuple(target_indices.shape)} are not [B, Kc, W], [N, W] and [B, M, Kt], nor with offsets [T, W]"
        )
    if table.dtype != context.dtype:
        raise ValueError(f"table is {table.dtype}, context {context.dtype}")
    if offsets is None and context.shape[0] != batch:
        raise ValueError(f"context is of {context.shape[0]} images, target_indices of {batch}")
    if offsets is not None and (offsets.shape != (batch + 1,) or offsets.dtype != torch.int32):
        raise ValueError(f"offsets are {offsets.dtype} {tuple(offsets.shape)}, want torch.int32 ({batch + 1},)")
    check_tensors(context.device, table=table, offsets=offsets, target_indices=target_indices)
    if choose("predictor_rows", impl, context.device.type, unsupported(context)) == "eager":
        return _predictor_rows_eager(context, table, target_indices, offsets, total)
    return _predictor_rows(
        context.contiguous(), table.contiguous(), target_indices.contiguous(), contiguous(offsets), total
    )


def sequence_offsets(offsets: Tensor, blocks: int, block_length: int) -> Tensor:
    """Return where the packed sequences of `predictor_rows` start, and the end of the last.

    Args:
        offsets: int32 [B + 1], the starts of the images' contexts.
        blocks, block_length: M and Kt.

    Returns int32 [B M + 1] on the same device, without waiting for it.
    """
    lengths = (offsets.diff() + block_length).repeat_interleave(blocks)
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _predictor_rows_eager(
    context: Tensor, table: Tensor, target_indices: Tensor, offsets: Tensor | None, total: int | None
) -> Tensor:
    batch, blocks, length = target_indices.shape
    masks = F.embedding(target_indices.long(), table)  # [B, M, Kt, W]
    if offsets is None:
        if total is not None and torch.compiler.is_compiling():  # the size of a concatenation would be a sum
            context = F.pad(context, (0, 0, 0, total - context.shape[1]))
            return context[:, None] + F.pad(masks, (0, 0, total - length, 0))
        return torch.cat([context[:, None].expand(-1, blocks, -1, -1), masks], dim=2)

    # Every token of the result is a row of [context | masks | zero], whose number is arithmetic on the device.
    device, kept, targets = context.device, context.shape[0], batch * blocks * length
    starts = sequence_offsets(offsets, blocks, length).long()
    token = torch.arange(blocks * kept + targets if total is None else total, device=device)
    sequence = torch.searchsorted(starts[1:], token, right=True)
    padding = sequence == batch * blocks
    image = sequence.where(~padding, 0) // blocks
    within, count = token - starts[sequence], offsets.diff()[image]
    source = torch.where(within < count, offsets[image] + within, kept + sequence * length + within - count)
    source = source.where(~padding, kept + targets)
    # Unlike indexing, an embedding has a deterministic gradient on a GPU, in half the time on a CPU.
    return F.embedding(source, torch.cat([context, masks.flatten(0, 2), context.new_zeros(1, context.shape[1])]))


@torch.library.custom_op("cjepa::predictor_rows", mutates_args=())
def _predictor_rows(
    context: Tensor, table: Tensor, target_indices: Tensor, offsets: Tensor | None, total: int | None
) -> Tensor:
    from cjepa_fast.kernels import predictor_rows as kernel

    return kernel.fwd(context, table, target_indices, offsets)


@_predictor_rows.register_fake
def _(
    context: Tensor, table: Tensor, target_indices: Tensor, offsets: Tensor | None, total: int | None
) -> Tensor:  # fmt: skip
    batch, blocks, length = target_indices.shape
    kept, width = context.shape[-2:]
    if offsets is None:
        return context.new_empty(batch, blocks, kept + length if total is None else total, width)
    return context.new_empty(blocks * kept + batch * blocks * length if total is None else total, width)


@torch.library.custom_op("cjepa::predictor_rows_backward", mutates_args=())
def _predictor_rows_backward(
    grads: Tensor, target_indices: Tensor, offsets: Tensor | None, context_shape: Sequence[int], patches: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the context and, in fp32, of the table [patches, W]."""
    from cjepa_fast.kernels import predictor_rows as kernel

    return kernel.bwd(grads.contiguous(), target_indices, offsets, context_shape, patches)


@_predictor_rows_backward.register_fake
def _(
    grads: Tensor, target_indices: Tensor, offsets: Tensor | None, context_shape: Sequence[int], patches: int
) -> tuple[Tensor, Tensor]:
    return grads.new_empty(context_shape), grads.new_empty((patches, context_shape[-1]), dtype=torch.float32)


def _save_indices(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    context, table, target_indices, offsets, _ = inputs
    ctx.save_for_backward(target_indices, offsets)
    ctx.context_shape, ctx.patches, ctx.dtype = context.shape, table.shape[0], table.dtype


def _differentiate_predictor_rows(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
    target_indices, offsets = ctx.saved_tensors
    context_grad, table_grad = _predictor_rows_backward(
        grads, target_indices, offsets, ctx.context_shape, ctx.patches
    )  # fmt: skip
    return context_grad, table_grad.to(ctx.dtype), None, None, None


_predictor_rows.register_autograd(_differentiate_predictor_rows, setup_context=_save_indices)


# torch counts matrix products only. Zero makes the count of both implementations equal.
@register_flop_formula([torch.ops.cjepa.predictor_rows, torch.ops.cjepa.predictor_rows_backward])
def _no_products(*args: Any, **kwargs: Any) -> int:
    return 0
