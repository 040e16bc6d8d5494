"""One training step as pure functions: tensors in, tensors out, no configuration, no host synchronisation.

targets -> student's loss and gradients -> (optimizer and EMA). Compilation and sharding are applied to the networks
from outside (`cjepa_fast.train`); nothing here knows of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cjepa_fast.losses import Projector, block_vicreg, context_target_vicreg, prediction_loss
from cjepa_fast.vit import Encoder, Predictor


class Networks(nn.Module):
    """What is trained (`encoder`, `predictor`, `projector`) and what follows by EMA (`target_encoder`).

    The names are those of the released I-JEPA checkpoints; `projector` is None for plain I-JEPA.
    """

    def __init__(
        self, encoder: Encoder, predictor: Predictor, target_encoder: Encoder, projector: Projector | None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.projector = projector
        self.target_encoder = target_encoder
        target_encoder.load_state_dict(encoder.state_dict())
        target_encoder.requires_grad_(False)

    def averages(self) -> dict[Tensor, Tensor]:
        """From the encoder's parameters to their averages, the target encoder's: for `cjepa_fast.optim.AdamW`."""
        return dict(zip(self.encoder.parameters(), self.target_encoder.parameters(), strict=True))


class LossWeights(NamedTuple):
    """Prediction loss and multiplied-out weights of the VICReg terms: C-JEPA publishes 0.001 * (25, 25, 1).

    `impl` picks the implementation of the fused operations (see `cjepa_fast.ops`), not what they compute.
    """

    prediction: str = "smooth_l1"
    sim: float = 0.025
    std: float = 0.025
    cov: float = 0.001
    views: str = "target_blocks"
    impl: str = "auto"


class Terms(NamedTuple):
    """Scalars [] fp32: loss = prediction + weighted sim, std, cov (the terms themselves are unweighted)."""

    loss: Tensor
    prediction: Tensor
    sim: Tensor
    std: Tensor
    cov: Tensor


class StepOutput(NamedTuple):
    """Detached results of a step: `terms`, the predictions [B, M, Kt, D] and the target encoder's output [B, N, D]."""

    terms: Terms
    predictions: Tensor
    targets: Tensor


@torch.no_grad()
def target_embeddings(target_encoder: nn.Module, images: Tensor) -> Tensor:
    """The target encoder's output for the whole images: [B, N, D], no gradient."""
    return target_encoder(images)


def student(networks: Networks, images: Tensor, context: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Context embeddings [B, Kc, D] and predictions [B, M, Kt, D] ; masks context [B, Kc], target [B, M, Kt]."""
    embeddings = networks.encoder(images, context)
    return embeddings, networks.predictor(embeddings, context, target)


def summary(embeddings: Tensor, predictions: Tensor, views: str) -> Tensor:
    """The mean embeddings that the VICReg terms see, at least fp32: [B, M, D] block means, or [B, D] context means."""
    return _precise(predictions).mean(dim=2) if views == "target_blocks" else _precise(embeddings).mean(dim=1)


def regularisation(
    projector: nn.Module, means: Tensor, targets: Tensor, weights: LossWeights
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Weighted sum of the VICReg terms of `means` (see `summary`) and the terms (sim, std, cov) themselves."""
    if weights.views == "target_blocks":
        terms = block_vicreg(projector(means), impl=weights.impl)
    else:
        projected = projector(torch.stack([means, _precise(targets).mean(dim=1)], dim=1))
        terms = context_target_vicreg(projected[:, 0], projected[:, 1].detach(), impl=weights.impl)
    sim, std, cov = terms
    return weights.sim * sim + weights.std * std + weights.cov * cov, terms


def forward_backward(
    networks: Networks, images: Tensor, context: Tensor, target: Tensor, weights: LossWeights, accumulate: int = 1
) -> StepOutput:  # fmt: skip
    """Computes the loss of one batch and accumulates its gradients into the student's parameters.

    Args:
        images: see `cjepa_fast.vit.Encoder`; B images of this rank.
        context, target: integer [B, Kc] and [B, M, Kt] patch indices.
        accumulate: number of micro-batches. The VICReg terms are statistics of the whole batch, so a sum over
            micro-batches would be another loss. Instead a first pass without gradient collects the mean embeddings,
            the terms are differentiated with respect to those, and the second pass carries that gradient through the
            networks (GradCache, Gao et al., 2021): the same gradient at the price of one more forward pass.
    """
    targets = torch.cat([target_embeddings(networks.target_encoder, part) for part in images.chunk(accumulate)])
    zero = torch.zeros((), device=images.device)
    terms, penalty = (zero, zero, zero), zero
    if accumulate == 1:
        embeddings, predictions = student(networks, images, context, target)
        prediction = prediction_loss(predictions, targets, target, weights.prediction, impl=weights.impl)
        if networks.projector is not None:
            means = summary(embeddings, predictions, weights.views)
            penalty, terms = regularisation(networks.projector, means, targets, weights)
        (prediction + penalty).backward()
    else:
        parts = list(zip(images.chunk(accumulate), context.chunk(accumulate), target.chunk(accumulate),
                         targets.chunk(accumulate), strict=True))  # fmt: skip
        grads: Sequence[Tensor | None] = [None] * len(parts)
        if networks.projector is not None:
            with torch.no_grad():
                means = torch.cat([summary(*student(networks, *part[:3]), weights.views) for part in parts])
            penalty, terms = regularisation(networks.projector, means.requires_grad_(), targets, weights)
            penalty.backward()
            assert means.grad is not None
            grads = means.grad.chunk(accumulate)
        done, prediction = [], zero
        for part, grad in zip(parts, grads, strict=True):
            embeddings, predictions = student(networks, *part[:3])
            share = prediction_loss(predictions, part[3], part[2], weights.prediction, impl=weights.impl)
            share = share * (part[0].shape[0] / images.shape[0])
            carried = zero if grad is None else (summary(embeddings, predictions, weights.views) * grad).sum()
            (share + carried).backward()
            prediction = prediction + share.detach()
            done.append(predictions.detach())
        predictions = torch.cat(done)
    sim, std, cov = (term.detach() for term in terms)
    prediction, penalty = prediction.detach(), penalty.detach()
    return StepOutput(Terms(prediction + penalty, prediction, sim, std, cov), predictions.detach(), targets)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
