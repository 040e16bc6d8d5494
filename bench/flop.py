"""Floating-point operations of the method, whatever an implementation does or saves: the yardstick of every rival."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from cjepa_fast.config import Config, VitShape, encoder_shape


class Flop(NamedTuple):
    """GFLOP per image of a training step: the target encoder runs forward, the other parts forward and backward."""

    context: float
    target: float
    predictor: float
    projector: float

    @property
    def total(self) -> float:
        return sum(self)


def gflop_per_image(c: Config, *, context_tokens: float, target_tokens: float) -> Flop:
    """Return the model FLOP of a training step over its images.

    A multiply-add counts 2 FLOP, a backward pass twice its forward pass. Recomputation is not added. Work that our
    step skips without changing the result is not subtracted. Norms, activations and losses are left out: below 1 %.

    Args:
        context_tokens, target_tokens: mean patches of a context and of a target block. Attention is taken at the
            mean; its quadratic cost adds less than 0.2 % for the published block sizes.
    """
    encoder, predictor = shapes(c)
    width, narrow = encoder.width, predictor.width
    patches, blocks = (c.model.image_size // c.model.patch_size) ** 2, c.mask.num_targets
    embed = 2 * 3 * c.model.patch_size**2 * width  # per patch; no gradient with respect to the image
    context = 3 * _blocks(encoder, context_tokens) + embed * (patches + context_tokens)
    target = _blocks(encoder, patches) + embed * patches
    predicted = 3 * (
        blocks * _blocks(predictor, context_tokens + target_tokens)
        + 2 * width * narrow * (context_tokens + blocks * target_tokens)
    )
    projected = 0.0
    if c.method == "cjepa":
        views = blocks if c.loss.vicreg_views == "target_blocks" else 2
        widths = (width, *projector_widths(c))
        projected = 3 * 2 * views * sum(rows * columns for rows, columns in itertools.pairwise(widths))
    return Flop(*(flop / 1e9 for flop in (context, target, predicted, projected)))


def shapes(c: Config) -> tuple[VitShape, VitShape]:
    """Return the shapes of the encoder and of the predictor."""
    encoder = encoder_shape(c.model.encoder)
    return encoder, VitShape(c.model.predictor_width, c.model.predictor_depth, encoder.heads)


def projector_widths(c: Config) -> tuple[int, ...]:
    """Return the output width of each layer of the projector."""
    width = encoder_shape(c.model.encoder).width
    return c.loss.projector or (width, width)


def _blocks(shape: VitShape, tokens: float) -> float:
    """Return the FLOP of a forward pass of all blocks: (8 + 4 mlp_ratio) D^2 n + 4 n^2 D each."""
    width, hidden = shape.width, round(shape.width * shape.mlp_ratio)
    return shape.depth * ((8 * width**2 + 4 * width * hidden) * tokens + 4 * tokens**2 * width)
