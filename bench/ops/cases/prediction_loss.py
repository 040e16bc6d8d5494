"""Prediction loss of one batch: predictions [B, M, Kt, D] against the target encoder's output [B, N, D].

"union": its output for the union of each image's target patches only, [T, D].

Traffic, with P the bytes of the predictions and T those of the distinct target rows that the masks name:
    forward   P + T        the loss is a scalar
    backward  2 P + T      both are read again and the predictions' gradient is written
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.ops.cases import UNINTERPRETED, Case, Variant, both_directions, compiled
from bench.timing import Inputs
from cjepa_fast import ops
from cjepa_fast.config import MaskConfig
from cjepa_fast.masks import MultiBlockSampler

# encoder, grid, width; the widest first, as time may run out
SHAPES = [("H/14", 16, 1280), ("L/16", 14, 1024), ("B/16", 14, 768), ("S/16", 14, 384)]


def loss(predictions: Tensor, targets: Tensor, indices: Tensor, offsets: Tensor | None, impl: str) -> Tensor:
    return ops.prediction_loss(predictions, targets, indices, offsets=offsets, impl=impl)


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    batch = 4 if quick else 128
    eager = functools.partial(loss, impl="eager")
    for encoder, grid, width in SHAPES[-2:] if quick else SHAPES:
        masks = MultiBlockSampler(grid, **vars(MaskConfig())).sample(0, range(batch), union=True)
        assert masks.union is not None and masks.union_offsets is not None and masks.target_slot is not None
        indices = masks.target
        _, blocks, length = indices.shape

        def inputs(
            targets: tuple[int, ...], indices: Tensor, offsets: Tensor | None,
            shape: tuple[int, ...] = (batch, blocks, length, width),
        ) -> Inputs:  # fmt: skip
            predictions = torch.randn(shape, device=device).to(dtype).requires_grad_()
            rows = torch.randn(targets, device=device).to(dtype)
            return (
                predictions,
                rows,
                indices.to(device, torch.int32),
                offsets if offsets is None else offsets.to(device),
            )

        predictions = indices.numel() * width * dtype.itemsize
        rows = (indices + grid * grid * torch.arange(batch)[:, None, None]).unique().numel()
        forward = predictions + rows * width * dtype.itemsize
        variants = [
            Variant(
                name="triton", call=functools.partial(loss, impl="triton"), role="ours",
                obstacle=None if device == "cuda" else UNINTERPRETED,
            ),
            Variant(name="eager", call=eager),
            compiled(eager),
        ]  # fmt: skip
        name = f"{encoder} B={batch} M={blocks} Kt={length} D={width}"
        for form, *given in (
            ("", (batch, grid * grid, width), indices, None),
            (" union", (len(masks.union), width), masks.target_slot, masks.union_offsets),
        ):
            yield from both_directions(
                name + form, variants, functools.partial(inputs, *given), eager, (forward, 0),
                (predictions + forward, 0),
            )  # fmt: skip
