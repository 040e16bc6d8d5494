"""Networks as a configuration describes them: the parts that methods are made of."""

from __future__ import annotations

import torch

from cjepa_fast.config import Config
from cjepa_fast.networks import Encoder, Impl, Predictor, build_encoder, build_predictor
from cjepa_fast.networks.heads import Projector


def activation_dtype(c: Config) -> torch.dtype:
    """Return the type of activations and matrix products."""
    return torch.bfloat16 if c.model.precision == "bf16" else torch.float32


def _impl(c: Config) -> Impl:
    return Impl(c.runtime.kernels, c.runtime.attention)


def encoder(c: Config) -> Encoder:
    """Build an encoder."""
    return build_encoder(
        c.model.encoder, c.model.image_size, c.model.patch_size, mean=c.data.mean, std=c.data.std,
        depth_rescale=c.model.depth_rescale_init, dtype=activation_dtype(c), impl=_impl(c),
    )  # fmt: skip


def predictor(c: Config) -> Predictor:
    """Build the predictor that goes with the encoder."""
    return build_predictor(
        c.model.encoder, c.model.image_size, c.model.patch_size, c.model.predictor_depth, c.model.predictor_width,
        depth_rescale=c.model.depth_rescale_init, shared_context=c.model.predictor_context == "shared",
        impl=_impl(c),
    )  # fmt: skip


def projector(c: Config, width: int) -> Projector:
    """Build the projector behind an encoder of this width."""
    return Projector(width, c.loss.projector or (width, width))
