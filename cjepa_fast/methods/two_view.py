"""VICReg (Bardes, Ponce & LeCun, ICLR 2022, arXiv 2105.04906): two augmented crops of each image should agree.

The expanded mean embeddings of both crops enter the loss l = lambda s + mu (v + v') + nu (c + c'), equation 6, in the
scaling of VICReg's public code, see `cjepa_fast.losses.vicreg`. There is no local loss: the expander's batch norm and
the terms need the whole batch.
"""

from __future__ import annotations

from torch import Tensor

from cjepa_fast.config import Config
from cjepa_fast.losses import vicreg
from cjepa_fast.masks import Masks
from cjepa_fast.methods import parts
from cjepa_fast.methods.protocol import Forward, Loss, Method, precise
from cjepa_fast.networks import Encoder
from cjepa_fast.networks.heads import Projector


class Vicreg(Method):
    """VICReg with a vision transformer.

    Args:
        expander: the head before the loss, applied to the mean over tokens.
        weights: of invariance, variance and covariance; VICReg publishes 25, 25, 1.
        kernels: implementation of the fused operations, see `cjepa_fast.ops`.
    """

    batch_terms = ("sim", "std", "cov")
    views = 2
    independent_views = True

    def __init__(
        self, encoder: Encoder, expander: Projector, weights: tuple[float, float, float], *, kernels: str
    ) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, expander
        self.weights, self.kernels = weights, kernels

    @property
    def judged(self) -> Encoder:
        return self.encoder

    def forward(self, images: Tensor, masks: Masks | None, targets: Tensor | None) -> Forward:
        tokens = self.encoder(images.flatten(0, 1))
        means = precise(tokens).mean(dim=1).unflatten(0, (2, -1)).transpose(0, 1)
        return Forward(means, None, tokens[: images.shape[1]].detach())

    def batch_loss(self, summary: Tensor) -> Loss:
        """Compute VICReg's weighted terms of the mean embeddings [B, 2, D]."""
        expanded = self.projector(summary)
        terms = vicreg(expanded[:, 0], expanded[:, 1], impl=self.kernels)
        sim, std, cov = (weight * term for weight, term in zip(self.weights, terms, strict=True))
        return sim + std + cov, terms


def build(c: Config) -> Vicreg:
    """Build VICReg."""
    encoder = parts.encoder(c)
    return Vicreg(encoder, parts.projector(c, encoder.width), c.loss.vicreg_coefficients, kernels=c.runtime.kernels)
