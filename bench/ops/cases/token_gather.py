"""Gathers: kept patches into the embedding, unique tokens into the predictor's sequences.

Patch embedding of R rows of 3 p p pixels to width D: 2 R D 3pp FLOP forward, as many backward (images get no gradient).
    forward   read the kept pixels, weight and positions, write R D
    backward  read R D gradients and the kept pixels, write the weight's gradient
Predictor rows: context [B, Kc, W] and table [N, W] to sequences [B, M, Kc + Kt, W], W = 3 D of q, k and v; for a
shared context M = 1, with all target tokens in one block.
    forward   read the context and the table, write the sequences
    backward  read the sequences' gradients, write the context's and the table's
Indices, below 1 %, are left out.

"reference style" is how published JEPA code does it: embed all patches by a convolution, then gather with an index that
is repeated to the width of the rows; repeat the position table per image and the context per block, concatenate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.cases import UNINTERPRETED, Case, Variant, both_directions, compiled
from bench.timing import Inputs
from cjepa_fast import ops
from cjepa_fast.config import MaskConfig
from cjepa_fast.masks import MultiBlockSampler

TESTS = ("test_patch_embed.py", "test_predictor_rows.py")

# encoder, image size, patch size, width, predictor width
SHAPES = [("H/14", 224, 14, 1280, 384), ("L/16", 224, 16, 1024, 384), ("B/16", 224, 16, 768, 384)]


def rows_by_repeated_index(table: Tensor, indices: Tensor) -> Tensor:
    """Rows [B, K, D] of a table [B, N, D]."""
    return torch.gather(table, 1, indices.long()[..., None].repeat(1, 1, table.shape[-1]))


def reference_patch_embed(
    images: Tensor, indices: Tensor | None, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int
) -> Tensor:  # fmt: skip
    kernel = weight.view(-1, 3, patch_size, patch_size)
    tokens = F.conv2d(images, kernel, bias.to(weight.dtype), stride=patch_size).flatten(2).transpose(1, 2)
    tokens = tokens + positions.to(weight.dtype)
    return tokens if indices is None else rows_by_repeated_index(tokens, indices)


def reference_predictor_rows(
    context: Tensor, table: Tensor, target_indices: Tensor, offsets: Tensor | None
) -> Tensor:  # fmt: skip
    assert offsets is None
    batch, blocks, _ = target_indices.shape
    tables = table.repeat(batch, 1, 1)
    masks = torch.cat([rows_by_repeated_index(tables, block) for block in target_indices.unbind(1)])
    tokens = torch.cat([context.repeat(blocks, 1, 1), masks], dim=1)
    return tokens.unflatten(0, (blocks, batch)).transpose(0, 1)


def one_hot_rows(context: Tensor, table: Tensor, target_indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Target rows, and so the table's gradient, by a product with a one-hot matrix."""
    assert offsets is None
    blocks = target_indices.shape[1]
    chosen = F.one_hot(target_indices.long(), table.shape[0]).to(table.dtype) @ table
    return torch.cat([context[:, None].expand(-1, blocks, -1, -1), chosen], dim=2)


def predictor_rows_of(
    context: Tensor, table: Tensor, target_indices: Tensor, offsets: Tensor | None, impl: str
) -> Tensor:
    return ops.predictor_rows(context, table, target_indices, offsets=offsets, impl=impl)


def variants(
    function: Callable[..., Tensor], device: str, reference: Callable[..., Tensor] | None
) -> tuple[list[Variant], Callable[..., Tensor]]:
    """The variants of an operation that takes `impl`, and its truth."""
    eager = functools.partial(function, impl="eager")
    found = [
        Variant(
            name="triton", call=functools.partial(function, impl="triton"), role="ours",
            obstacle=None if device == "cuda" else UNINTERPRETED,
        ),
        Variant(name="eager", call=eager),
        compiled(eager),
    ]  # fmt: skip
    if reference is not None:
        found.append(Variant(name="reference style", call=reference))
    return found, eager


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    batch = 2 if quick else 128
    for encoder, image_size, patch_size, width, predictor_width in SHAPES[-1:] if quick else SHAPES:
        masks = MultiBlockSampler(image_size // patch_size, **vars(MaskConfig())).sample(0, range(batch))
        context = masks.context.to(device, torch.int32)
        packed = MultiBlockSampler(image_size // patch_size, **vars(MaskConfig(mode="packed"))).sample(0, range(batch))
        for rows, target, offsets in (
            (context.shape[1], masks.target, None),
            (context.shape[1], masks.target.flatten(1)[:, None], None),
            (len(packed.context), packed.target, packed.offsets),
        ):
            yield from predictor_rows(encoder, 3 * predictor_width, image_size // patch_size, rows, target, offsets,
                                      device, dtype)  # fmt: skip
        for raw, indices in ((True, context), (True, None), (False, context)):
            yield from patch_embed(encoder, image_size, patch_size, width, indices, raw, batch, device, dtype)


def predictor_rows(
    encoder: str, width: int, grid: int, rows: int, target_indices: Tensor, offsets: Tensor | None, device: str,
    dtype: torch.dtype,
) -> Iterator[Case]:  # fmt: skip
    """With offsets, `rows` are those of all contexts, else of one image."""
    batch, blocks, length = target_indices.shape

    def inputs() -> Inputs:
        shape = (batch, rows, width) if offsets is None else (rows, width)
        context, table = (torch.randn(size, device=device).to(dtype) for size in (shape, (grid * grid, width)))
        starts = None if offsets is None else offsets.to(device)
        return context.requires_grad_(), table.requires_grad_(), target_indices.to(device, torch.int32), starts

    total = batch * rows if offsets is None else rows
    read = (total + grid * grid) * width * dtype.itemsize
    written = blocks * (total + batch * length) * width * dtype.itemsize
    found, truth = variants(predictor_rows_of, device, reference_predictor_rows if offsets is None else None)
    if offsets is None:
        found.append(Variant(name="one-hot product", call=one_hot_rows))
    name = f"rows {encoder} B={batch} {'Kc' if offsets is None else 'packed T'}={rows} M={blocks} Kt={length} W={width}"
    yield from both_directions(name, found, inputs, truth, (read + written, 0), (read + written, 0))


def patch_embed(
    encoder: str, image_size: int, patch_size: int, width: int, indices: Tensor | None, raw: bool, batch: int,
    device: str, dtype: torch.dtype,
) -> Iterator[Case]:  # fmt: skip
    patches = (image_size // patch_size) ** 2
    kept = patches if indices is None else indices.shape[1]
    columns = 3 * patch_size**2

    def inputs() -> Inputs:
        if raw:
            images = torch.randint(256, (batch, image_size, image_size, 3), dtype=torch.uint8, device=device)
        else:
            images = torch.randn(batch, 3, image_size, image_size, device=device).to(dtype)
        weight = (torch.randn(width, columns, device=device) / columns**0.5).to(dtype).requires_grad_()
        bias = torch.randn(width, device=device).requires_grad_()
        return images, indices, weight, bias, torch.randn(patches, width, device=device)

    pixels = batch * kept * columns * (1 if raw else dtype.itemsize)
    weights, tokens = width * columns * dtype.itemsize, batch * kept * width * dtype.itemsize
    flop = 2 * batch * kept * width * columns
    found, truth = variants(
        functools.partial(ops.patch_embed, patch_size=patch_size), device,
        None if raw else functools.partial(reference_patch_embed, patch_size=patch_size),
    )  # fmt: skip
    name = f"embed {encoder} {'uint8' if raw else 'float'} B={batch} K={kept} D={width}"
    forward = (pixels + weights + patches * width * 4 + tokens, flop)
    yield from both_directions(name, found, inputs, truth, forward, (tokens + pixels + weights, flop))
