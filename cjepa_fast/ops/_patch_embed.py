"""Embedding of the kept patches: gather and matrix product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cjepa_fast.ops._checks import check_tensors, contiguous, unsupported
from cjepa_fast.ops._choice import choose


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
    if positions.requires_grad:
        raise ValueError("positions require a gradient, but they are a fixed table: detach them")
    check_tensors(images.device, positions=positions, weight=weight, bias=bias, indices=indices, image_of=image_of)
    why = unsupported(*([] if raw else [images]), weight, bias, positions)
    if choose("patch_embed", impl, images.device.type, why) == "eager":
        return _patch_embed_eager(images.detach(), indices, weight, bias, positions, patch_size, image_of)
    out, _ = _patch_embed(
        images.detach().contiguous(), contiguous(indices), contiguous(image_of), weight, bias.contiguous(),
        positions.contiguous(), patch_size,
    )  # fmt: skip
    return out if image_of is not None else out.view(batch, count if indices is None else indices.shape[1], embedding)


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


@torch.library.custom_op("cjepa::patch_embed", mutates_args=())
def _patch_embed(
    images: Tensor, indices: Tensor | None, image_of: Tensor | None, weight: Tensor, bias: Tensor, positions: Tensor,
    patch_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the embedding [rows, D], and the patches [rows, 3 p p] for the gradient."""
    from cjepa_fast.kernels import patch_embed as kernel

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
    from cjepa_fast.kernels import patch_embed as kernel

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


@register_flop_formula(torch.ops.cjepa.patch_embed)
def _one_product(
    images: Any, indices: Any, image_of: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any
) -> int:
    (rows, width), _ = out_shape
    return 2 * rows * width * weight[1]


@register_flop_formula(torch.ops.cjepa.column_sum)
def _no_products(*args: Any, **kwargs: Any) -> int:
    return 0
