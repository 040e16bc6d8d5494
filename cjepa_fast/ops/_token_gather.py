"""The token gather: kept patches into the embedding, context and mask tokens into the predictor's sequences."""

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
    """Linear embedding of the kept p x p patches plus their positions: y = W x + b + e[index].

    Images and positions are constants: no gradient reaches them. An index outside [0, N), or an image outside [0, B),
    is an error of the eager implementation and makes the row NaN in the Triton one.

    The Triton kernel gathers the patches and writes b + e[index] in one launch, and one cuBLAS product accumulates
    onto that. The gathered patches are kept for the weight's gradient: they take a seventeenth of the memory of one
    transformer block's activations, and gathering them again would cost a launch and a pass.

    Args:
        images: uint8 [B, H, W, 3] or floating [B, 3, H, W].
        indices: integer (16, 32 or 64 bits) [B, K], row-major patch numbers, or None for all N = (H/p)(W/p) patches;
            [T] in the packed mode.
        weight: [D, 3 p p], flattened as a patch lies in the images: (row, column, channel) for uint8 and
            (channel, row, column) for floating images. Its dtype is the product's and the result's.
        bias: [D], positions: [N, D]; floating. Left in fp32 they are added in fp32 and rounded once by the kernel.
        image_of: int32 [T], the packed mode: token t is patch indices[t] of image image_of[t], or padding if that
            is -1, whatever indices[t] is. Rows of padding are zero, and their gradient is left out of the bias'.
        impl: see `cjepa_fast.ops`. The Triton kernel takes fp32, bf16 and fp16 and is deterministic.

    Returns [B, K, D], or [T, D] in the packed mode.

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


def predictor_tokens(
    context: Tensor, mask_token: Tensor, positions: Tensor, context_indices: Tensor, target_indices: Tensor, *,
    offsets: Tensor | None = None, shared_context: bool = False, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """The predictor's input: per image and block [context + positions | mask token + positions of the block].

    Positions are constants: no gradient reaches them. An index outside [0, N) is an error of the eager implementation
    and makes the row NaN in the Triton one.

    Args:
        context: projected context embeddings [B, Kc, D]; packed [T, D].
        mask_token: D elements of any shape. positions: [N, D]. Left in fp32 they are added in fp32 by the kernel.
        context_indices: integer (16, 32 or 64 bits) [B, Kc]; packed [T].
        target_indices: integer [B, M, Kt].
        offsets: int32 [B + 1], the packed mode: the context of image b is rows offsets[b] to offsets[b + 1], with
            offsets[0] = 0 and offsets[B] <= T. Rows from offsets[B] on are padding, whatever their indices are.
        shared_context: one sequence per image, [context | block 1 | ... | block M].
        impl: see `cjepa_fast.ops`. The Triton kernel takes fp32, bf16 and fp16 and is deterministic.

    Returns, in the context's dtype,
        [B, M, Kc + Kt, D], or with a shared context [B, Kc + M Kt, D];
        packed: sequence s = b M + m behind sequence s - 1, [M T + B M Kt, D], or with a shared context
        [T + B M Kt, D]. `sequence_offsets` says where they start. Rows behind the last sequence are zero.

    Raises UserError if impl is unknown or cannot run, ValueError if shapes, dtypes or devices do not match.
    """
    width = context.shape[-1]
    rows = context.shape[:-1]
    if target_indices.ndim != 3 or context_indices.shape != rows or context.ndim != (3 if offsets is None else 2):
        raise ValueError(
            f"context {tuple(context.shape)}, context_indices {tuple(context_indices.shape)} and target_indices "
            f"{tuple(target_indices.shape)} are not [B, Kc, D], [B, Kc] and [B, M, Kt], nor with offsets [T, D] and [T]"
        )
    _check_images(context, target_indices, offsets)
    if positions.ndim != 2 or positions.shape[1] != width or mask_token.numel() != width:
        raise ValueError(
            f"context of width {width} wants positions [N, {width}] and a mask token of {width}, "
            f"got {tuple(positions.shape)} and {tuple(mask_token.shape)}"
        )
    _check(
        context.device, positions=positions, mask_token=mask_token, offsets=offsets, context_indices=context_indices,
        target_indices=target_indices,
    )  # fmt: skip
    if shared_context:  # one block of all target tokens
        target_indices = target_indices.flatten(1)[:, None]
    mask_token = mask_token.reshape(width)
    unsupported = _unsupported(context, mask_token, positions)
    if choose("predictor_tokens", impl, context.device.type, unsupported) == "eager":
        tokens = _predictor_tokens_eager(context, mask_token, positions, context_indices, target_indices, offsets)
    else:
        tokens = _predictor_tokens(
            context.contiguous(), mask_token.contiguous(), positions.contiguous(), context_indices.contiguous(),
            target_indices.contiguous(), _contiguous(offsets), None,
        )  # fmt: skip
    return tokens.squeeze(1) if shared_context and offsets is None else tokens


def predictor_rows(
    context: Tensor, table: Tensor, target_indices: Tensor, *, offsets: Tensor | None = None, total: int | None = None,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """The sequences of `predictor_tokens` from rows that are ready: per image and block [context | table[block]].

    What acts on each row alone, such as the norm and projection to q, k and v of the predictor's first block, need then
    be computed once for each context token, which all M sequences of an image share, and once for each place of the
    grid, as mask tokens of one place are equal in all images. An index outside [0, N) is an error of the eager
    implementation and makes the row NaN in the Triton one.

    Args:
        context: [B, Kc, W]; packed [T, W].
        table: [N, W], in the context's dtype.
        target_indices: integer (16, 32 or 64 bits) [B, M, Kt], rows of the table.
        offsets: int32 [B + 1], the packed mode, as for `predictor_tokens`.
        total: Kc + Kt, or packed M T + B M Kt, for a compiler of dynamic shapes, which cannot divide by a sum.
        impl: see `cjepa_fast.ops`. The Triton kernel takes fp32, bf16 and fp16 and is deterministic: a row of the
            table gets the sum of its copies' gradients in fp32 and in one order.

    Returns [B, M, Kc + Kt, W], or packed [M T + B M Kt, W] as `predictor_tokens` does.

    Raises UserError if impl is unknown or cannot run, ValueError if shapes, dtypes or devices do not match.
    """
    width = context.shape[-1]
    if target_indices.ndim != 3 or context.ndim != (3 if offsets is None else 2) or table.shape[1:] != (width,):
        raise ValueError(
            f"context {tuple(context.shape)}, table {tuple(table.shape)} and target_indices "
            f"{tuple(target_indices.shape)} are not [B, Kc, W], [N, W] and [B, M, Kt], nor with offsets [T, W]"
        )
    if table.dtype != context.dtype:
        raise ValueError(f"table is {table.dtype}, context {context.dtype}")
    _check_images(context, target_indices, offsets)
    _check(context.device, table=table, offsets=offsets, target_indices=target_indices)
    if choose("predictor_rows", impl, context.device.type, _unsupported(context)) == "eager":
        return _sequences_eager(context, F.embedding(target_indices.long(), table), offsets, total)
    return _predictor_tokens(
        context.contiguous(), None, table.contiguous(), None, target_indices.contiguous(), _contiguous(offsets), total
    )  # fmt: skip


def sequence_offsets(offsets: Tensor, blocks: int, block_length: int, shared_context: bool) -> Tensor:
    """Where the packed sequences of `predictor_tokens` start, and the end of the last.

    Args:
        offsets: int32 [B + 1], the starts of the images' contexts.
        blocks, block_length: M and Kt.

    Returns int32 [B M + 1], or [B + 1] with a shared context, on the same device and without waiting for it.
    """
    if shared_context:
        blocks, block_length = 1, blocks * block_length
    lengths = (offsets.diff() + block_length).repeat_interleave(blocks)
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _check(device: torch.device, **tensors: Tensor | None) -> None:
    """What all operations refuse: positions that want a gradient, indices that are none, a second device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name == "positions" and tensor.requires_grad:
            raise ValueError("positions require a gradient, but they are a fixed table: detach them")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")
        if name.endswith("indices") and tensor.dtype not in _INTEGERS:
            raise ValueError(f"{name} is {tensor.dtype}, want int16, int32 or int64")


def _check_images(context: Tensor, target_indices: Tensor, offsets: Tensor | None) -> None:
    """Refuses contexts and targets of different numbers of images."""
    batch = target_indices.shape[0]
    if offsets is None and context.shape[0] != batch:
        raise ValueError(f"context is of {context.shape[0]} images, target_indices of {batch}")
    if offsets is not None and (offsets.shape != (batch + 1,) or offsets.dtype != torch.int32):
        raise ValueError(f"offsets are {offsets.dtype} {tuple(offsets.shape)}, want torch.int32 ({batch + 1},)")


def _unsupported(*floats: Tensor) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    strange = [str(tensor.dtype) for tensor in floats if tensor.dtype not in _FLOATS]
    return f"dtypes {', '.join(strange)} are not fp32, bf16 or fp16" if strange else None


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
        # unlike [], an embedding does not take negative indices for rows from the end
        positions = F.embedding(indices, positions)
        patches = patches[image_of, indices]
    tokens = F.linear(patches.to(dtype), weight, bias.to(dtype)) + positions
    return tokens if padding is None else tokens.masked_fill(padding[:, None], 0)


def _predictor_tokens_eager(
    context: Tensor, mask_token: Tensor, positions: Tensor, context_indices: Tensor, target_indices: Tensor,
    offsets: Tensor | None,
) -> Tensor:  # fmt: skip
    positions, context_indices = positions.to(context.dtype), context_indices.long()
    masks = mask_token.to(context.dtype) + F.embedding(target_indices.long(), positions)
    if offsets is not None:  # whatever the indices of padding are
        real = torch.arange(context.shape[0], device=context.device) < offsets[-1]
        context_indices = context_indices.where(real, 0)
    return _sequences_eager(context + F.embedding(context_indices, positions), masks, offsets)


def _sequences_eager(context: Tensor, masks: Tensor, offsets: Tensor | None, rows: int | None = None) -> Tensor:
    """[context | masks of one block] for each image and block; masks [B, M, Kt, D]."""
    batch, blocks, length, _ = masks.shape
    if offsets is None and rows is not None and torch.compiler.is_compiling():  # the size of a cat would be a sum
        return F.pad(context, (0, 0, 0, rows - context.shape[1]))[:, None] + F.pad(masks, (0, 0, rows - length, 0))
    if offsets is None:
        return torch.cat([context[:, None].expand(-1, blocks, -1, -1), masks], dim=2)

    # every row of the result is a row of [context | masks | zero], whose numbers are arithmetic on the device
    device, total, targets = context.device, context.shape[0], batch * blocks * length
    starts = sequence_offsets(offsets, blocks, length, False).long()
    row = torch.arange(blocks * total + targets if rows is None else rows, device=device)
    sequence = torch.searchsorted(starts[1:], row, right=True)
    behind = sequence == batch * blocks
    image = sequence.where(~behind, 0) // blocks
    within, count = row - starts[sequence], offsets.diff()[image]
    source = torch.where(within < count, offsets[image] + within, total + sequence * length + within - count)
    source = source.where(~behind, total + targets)
    # its gradient is deterministic on a GPU too, and on a CPU takes half the time of that of []
    return F.embedding(source, torch.cat([context, masks.flatten(0, 2), context.new_zeros(1, context.shape[1])]))


@torch.library.custom_op("cjepa::patch_embed", mutates_args=())
def _patch_embed(
    images: Tensor, indices: Tensor | None, image_of: Tensor | None, weight: Tensor, bias: Tensor, positions: Tensor,
    patch_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The embedding [rows, D] and the patches [rows, 3 p p] that its gradient wants."""
    from cjepa_fast.kernels import token_gather as kernel

    patches, tokens = kernel.patches_and_tokens(
        images, indices, image_of, bias, positions, patch_size, weight.dtype
    )  # fmt: skip
    # inside the operation because in place: addmm out of place would first copy the tokens, and the counter of FLOP
    # does not know addmm_
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
    """The sum [D] fp32 of the rows [rows, D] that are not padding."""
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


@torch.library.custom_op("cjepa::predictor_tokens", mutates_args=())
def _predictor_tokens(
    context: Tensor, mask_token: Tensor | None, positions: Tensor, context_indices: Tensor | None,
    target_indices: Tensor, offsets: Tensor | None, total: int | None,
) -> Tensor:  # fmt: skip
    """`predictor_tokens`, or without mask token and context indices `predictor_rows`."""
    from cjepa_fast.kernels import token_gather as kernel

    return kernel.tokens_fwd(context, mask_token, positions, context_indices, target_indices, offsets)


@_predictor_tokens.register_fake
def _(
    context: Tensor, mask_token: Tensor | None, positions: Tensor, context_indices: Tensor | None,
    target_indices: Tensor, offsets: Tensor | None, total: int | None,
) -> Tensor:  # fmt: skip
    batch, blocks, length = target_indices.shape
    rows, width = context.shape[-2:]
    if offsets is None:
        return context.new_empty(batch, blocks, rows + length if total is None else total, width)
    return context.new_empty(blocks * rows + batch * blocks * length if total is None else total, width)


@torch.library.custom_op("cjepa::predictor_tokens_backward", mutates_args=())
def _predictor_tokens_backward(
    grads: Tensor, target_indices: Tensor, offsets: Tensor | None, context_shape: Sequence[int], patches: int | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of the context and, in fp32, of the mask token [D] or of the table of so many patches [N, D]."""
    from cjepa_fast.kernels import token_gather as kernel

    return kernel.tokens_bwd(grads.contiguous(), target_indices, offsets, context_shape, patches)


@_predictor_tokens_backward.register_fake
def _(
    grads: Tensor, target_indices: Tensor, offsets: Tensor | None, context_shape: Sequence[int], patches: int | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (context_shape[-1],) if patches is None else (patches, context_shape[-1])
    return grads.new_empty(context_shape), grads.new_empty(shape, dtype=torch.float32)


def _save_indices(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    context, mask_token, positions, _, target_indices, offsets, _ = inputs
    ctx.save_for_backward(target_indices, offsets)
    ctx.context_shape, ctx.patches = context.shape, positions.shape[0] if mask_token is None else None
    ctx.dtype = (positions if mask_token is None else mask_token).dtype


def _differentiate_predictor_tokens(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
    target_indices, offsets = ctx.saved_tensors
    context_grad, sums = _predictor_tokens_backward(grads, target_indices, offsets, ctx.context_shape, ctx.patches)
    sums = sums.to(ctx.dtype)
    mask_grad, table_grad = (sums, None) if ctx.patches is None else (None, sums)
    return context_grad, mask_grad, table_grad, None, None, None, None


_predictor_tokens.register_autograd(_differentiate_predictor_tokens, setup_context=_save_indices)


@register_flop_formula(torch.ops.cjepa.patch_embed)
def _one_product(
    images: Any, indices: Any, image_of: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any
) -> int:
    (rows, width), _ = out_shape
    return 2 * rows * width * weight[1]


# torch counts matrix products only; saying so makes both implementations count the same
@register_flop_formula(
    [torch.ops.cjepa.column_sum, torch.ops.cjepa.predictor_tokens, torch.ops.cjepa.predictor_tokens_backward]
)
def _no_products(*args: Any, **kwargs: Any) -> int:
    return 0
