"""Prediction loss of one batch: predictions [B, M, Kt, D] against the target encoder's output [B, N, D].

Traffic, with P the bytes of the predictions and T those of the distinct target rows that the masks name:
    forward   P + T        the loss is a scalar
    backward  2 P + T      both are read again and the predictions' gradient is written
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import UNINTERPRETED, Case, Variant, both_directions, compiled
from bench.timing import Inputs
from cjepa_fast import ops
from cjepa_fast.masks import MultiBlockSampler

# encoder, grid, width; the widest first, as time may run out
SHAPES = [("H/14", 16, 1280), ("L/16", 14, 1024), ("B/16", 14, 768), ("S/16", 14, 384)]


def loss(predictions: Tensor, targets: Tensor, indices: Tensor, impl: str) -> Tensor:
    return ops.prediction_loss(predictions, targets, indices, impl=impl)


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    batch = 4 if quick else 128
    eager = functools.partial(loss, impl="eager")
    for encoder, grid, width in SHAPES[-2:] if quick else SHAPES:
        indices = MultiBlockSampler(grid).sample(0, range(batch)).target
        _, blocks, length = indices.shape

        def inputs(
            shape: tuple[int, ...] = (batch, blocks, length, width), patches: int = grid * grid,
            indices: Tensor = indices,
        ) -> Inputs:  # fmt: skip
            predictions = torch.randn(shape, device=device).to(dtype).requires_grad_()
            targets = torch.randn(batch, patches, shape[-1], device=device).to(dtype)
            return predictions, targets, indices.to(device, torch.int32)

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
        yield from both_directions(name, variants, inputs, eager, (forward, 0), (predictions + forward, 0))
