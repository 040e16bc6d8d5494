"""The token gather: kept patches into the embedding, unique tokens into the predictor's sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cjepa_fast.ops._choice import choose

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int16, torch.int32, torch.int64)


def patch_embed(
    images: Tensor, indices: Tensor | None, weight: Tensor, bias: Tensor, positions: Tensor, *, patch_size: int,
    image_of: Tensor | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Embed the kept p x p patches and add their positions: y = W x + b + e[index].

    Images and positions are constants: no gradient reaches them. For an index outside [0, N) or an image outside
    [0, B), the eager implementation raises, and the Triton one makes the token NaN.

    The Triton kernel gathers the patches and writes b + e[index] in one launch; one cuBLAS product accumulates onto
    the result. The gathered patches are kept for the weight's gradient. They take a seventeenth of the memory of one
    transformer block's activations; gathering again would cost a launch and a pass.

    Args:
        images: uint8 [B, H, W, 3] or floating [B, 3, H, W].
        indices: integer (16, 32 or 64 bits) [B, K], row-major patch numbers, or None for all N = (H/p)(W/p) patches;
            [T] in packed mode.
        weight: [D, 3 p p], flattened as a patch lies in the images: (row, column, channel) for uint8 and
            (channel, row, column) for floating images. Its dtype is the product's and the result's.
        bias: [D], positions: [N, D]; floating. The kernel adds fp32 ones in fp32 and rounds once.
        image_of: int32 [T], packed mode: token t is patch indices[t] of image image_of[t], or padding if image_of[t]
            is -1, whatever indices[t] is. Padding is zero, and its gradient is left out of the bias's.
        impl: see `cjepa_fast.ops`. The Triton kernel takes fp32, bf16 and fp16 and is deterministic.

    Returns [B, K, D], or [T, D] in packed mode.

    Raises UserError if impl is unknown or cannot run, ValueError if shapes, dtypes or devices do not match.
    """
    raw = images.dtype == torch.uint8
    if images.ndim != 4 or images.shape[3 if raw else 1] != 3 or not (raw or images.is_floating_point()):
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}, neither uint8 [B, H, W, 3] nor floating [B, 3, H, W]"
        )
    batch, (height, width) = images.shape[0], images.shape[1:3] if raw else images.shape[2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {patch_size}")
    count, columns = (height // patch_size) * (width // patch_size), 3 * patch_size**2
    embedding = weight.shape[0]
    if weight.shape != (embedding, columns) or bias.shape != (embedding,) or positions.shape != (count, embedding):
        raise ValueError(
            f"{height} x {width} pixels in patches of {patch_size} want weight [D, {columns}], bias [D] and positions "
            f"[{count}, D], got {tuple(weight.shape)}, {tuple(bias.shape)} and {tuple(positions.shape)}"
        )
    if image_of is not None:
        if indices is None or indices.ndim != 1 or indices.shape != image_of.shape or image_of.dtype != torch.int32:
            raise ValueError(
                f"image_of is {image_of.dtype} {tuple(image_of.shape)}, want int32 [T] beside indices [T], "
                f"got indices {None if indices is None else tuple(indices.shape)}"
            )
    elif indices is not None and (indices.ndim != 2 or indices.shape[0] != batch):
        raise ValueError(f"indices are {tuple(indices.shape)}, want [{batch}, K] without image_of")
    _check(images.device, positions=positions, weight=weight, bias=bias, indices=indices, image_of=image_of)
    unsupported = _unsupported(*([] if raw else [images]), weight, bias, positions)
    if choose("patch_embed", impl, images.device.type, unsupported) == "eager":
        return _patch_embed_eager(images.detach(), indices, weight, bias, positions, patch_size, image_of)
    out, _ = _patch_embed(
        images.detach().contiguous(), _contiguous(indices), _contiguous(image_of), weight, bias.contiguous(),
        positions.contiguous(), patch_size,
    )  # fmt: skip
    return out if image_of is not None else out.view(batch, count if indices is None else indices.shape[1], embedding)


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
    _check(context.device, table=table, offsets=offsets, target_indices=target_indices)
    if choose("predictor_rows", impl, context.device.type, _unsupported(context)) == "eager":
        return _predictor_rows_eager(context, table, target_indices, offsets, total)
    return _predictor_rows(
        context.contiguous(), table.contiguous(), target_indices.contiguous(), _contiguous(offsets), total
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


def _check(device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ValueError for positions that want a gradient, indices of a wrong type, or a second device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name == "positions" and tensor.requires_grad:
            raise ValueError("positions require a gradient, but they are a fixed table: detach them")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")
        if name.endswith("indices") and tensor.dtype not in _INTEGERS:
            raise ValueError(f"{name} is {tensor.dtype}, want int16, int32 or int64")


def _unsupported(*floats: Tensor) -> str | None:
    """Return why the kernels cannot take these tensors; None if they can."""
    other = [str(tensor.dtype) for tensor in floats if tensor.dtype not in _FLOATS]
    return f"dtypes {', '.join(other)} are not fp32, bf16 or fp16" if other else None


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _patch_embed_eager(
    images: Tensor, indices: Tensor | None, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int,
    image_of: Tensor | None,
) -> Tensor:  # fmt: skip
    p, dtype = patch_size, weight.dtype
    if images.dtype == torch.uint8:
        patches = images.unflatten(2, (-1, p)).unflatten(1, (-1, p)).transpose(2, 3)  # [B, H/p, W/p, p, p, 3]
    else:
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
    patches = patches.flatten(3).flatten(1, 2)  # [B, N, 3 p p]
    positions, padding = positions.to(dtype), None
    if indices is not None:
        indices = indices.long()
        if image_of is None:
            image_of = torch.arange(images.shape[0], device=images.device)[:, None]
        else:
            padding = image_of == -1
            image_of, indices = image_of.where(~padding, 0), indices.where(~padding, 0)
        # Unlike indexing, an embedding refuses negative indices.
        positions = F.embedding(indices, positions)
        patches = patches[image_of, indices]
    tokens = F.linear(patches.to(dtype), weight, bias.to(dtype)) + positions
    return tokens if padding is None else tokens.masked_fill(padding[:, None], 0)


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


@torch.library.custom_op("cjepa::patch_embed", mutates_args=())
def _patch_embed(
    images: Tensor, indices: Tensor | None, image_of: Tensor | None, weight: Tensor, bias: Tensor, positions: Tensor,
    patch_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the embedding [rows, D], and the patches [rows, 3 p p] for the gradient."""
    from cjepa_fast.kernels import token_gather as kernel

    patches, tokens = kernel.patches_and_tokens(
        images, indices, image_of, bias, positions, patch_size, weight.dtype
    )  # fmt: skip
    # In place, as addmm would first copy the tokens. Inside the operation, as torch's FLOP counter ignores addmm_.
    return tokens.addmm_(patches, weight.t()), patches


@_patch_embed.register_fake
def _(
    images: Tensor, indices: Tensor | None, image_of: Tensor | None, weight: Tensor, bias: Tensor, positions: Tensor,
    patch_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = indices.numel() if indices is not None else images.shape[0] * positions.shape[0]
    return weight.new_empty(rows, weight.shape[0]), weight.new_empty(rows, weight.shape[1])


@torch.library.custom_op("cjepa::column_sum", mutates_args=())
def _column_sum(grads: Tensor, image_of: Tensor | None) -> Tensor:
    """Return the sum [D] fp32 of the rows [rows, D] that are not padding."""
    from cjepa_fast.kernels import token_gather as kernel

    return kernel.column_sum(grads.contiguous(), image_of)


@_column_sum.register_fake
def _(grads: Tensor, image_of: Tensor | None) -> Tensor:
    return grads.new_empty(grads.shape[1], dtype=torch.float32)


def _save_patches(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, image_of, _, bias, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], image_of)
    ctx.bias_dtype = bias.dtype


def _differentiate_patch_embed(ctx: Any, grads: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    patches, image_of = ctx.saved_tensors
    weight_grad = grads.t() @ patches if ctx.needs_input_grad[3] else None
    bias_grad = _column_sum(grads, image_of).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return None, None, None, weight_grad, bias_grad, None, None


_patch_embed.register_autograd(_differentiate_patch_embed, setup_context=_save_patches)


@torch.library.custom_op("cjepa::predictor_rows", mutates_args=())
def _predictor_rows(
    context: Tensor, table: Tensor, target_indices: Tensor, offsets: Tensor | None, total: int | None
) -> Tensor:
    from cjepa_fast.kernels import token_gather as kernel

    return kernel.rows_fwd(context, table, target_indices, offsets)


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
    from cjepa_fast.kernels import token_gather as kernel

    return kernel.rows_bwd(grads.contiguous(), target_indices, offsets, context_shape, patches)


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


@register_flop_formula(torch.ops.cjepa.patch_embed)
def _one_product(
    images: Any, indices: Any, image_of: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any
) -> int:
    (rows, width), _ = out_shape
    return 2 * rows * width * weight[1]


# torch counts matrix products only. Zero makes the count of both implementations equal.
@register_flop_formula(
    [torch.ops.cjepa.column_sum, torch.ops.cjepa.predictor_rows, torch.ops.cjepa.predictor_rows_backward]
)
def _no_products(*args: Any, **kwargs: Any) -> int:
    return 0
