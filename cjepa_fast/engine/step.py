"""One training step as pure functions: tensors in, tensors out, no configuration, no host synchronisation.

targets -> student's loss and gradients -> (optimizer and EMA). Compilation and sharding are applied to the networks
from outside (`cjepa_fast.train`); nothing here knows of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cjepa_fast.distributed import world_size
from cjepa_fast.engine.optim import AdamW
from cjepa_fast.losses import block_vicreg, context_target_vicreg, prediction_loss
from cjepa_fast.masks import Masks
from cjepa_fast.networks import Encoder, Predictor
from cjepa_fast.networks.heads import Projector
from cjepa_fast.networks.sequences import Layout, Selection


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
        """From the encoder's parameters to their averages, the target encoder's: for `engine.optim.AdamW`."""
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
    """Detached results of a step: `terms`, the predictions [B, M, Kt, D] and the target encoder's output [B, N, D],
    None if not all of it was computed.
    """

    terms: Terms
    predictions: Tensor
    targets: Tensor | None


@torch.no_grad()
def target_embeddings(target_encoder: Encoder, images: Tensor, masks: Masks | None = None) -> Tensor:
    """The target encoder's output, no gradient: [B, N, D]; or, where masks list the union of each image's targets,
    the rows [union_cap, D] of these patches alone, image after image.
    """
    if masks is None or masks.union is None:
        return target_encoder(images)
    starts = masks.union_offsets
    assert starts is not None
    patches = len(target_encoder.pos_embed[0])
    image = torch.searchsorted(starts[1:], torch.arange(len(masks.union), device=starts.device), right=True)
    rows = torch.where(masks.union < 0, 0, image * patches + masks.union)  # padding takes some row
    longest = min(patches, masks.target[0].numel())
    return target_encoder(images, wanted=Selection(index=rows, layout=Layout(starts, longest)))


def student(networks: Networks, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
    """Context embeddings [B, Kc, D], or packed [cap, D], and predictions [B, M, Kt, D]."""
    layout = Layout(masks.offsets, len(networks.encoder.pos_embed[0]) if masks.offsets is not None else None)
    embeddings = networks.encoder(images, masks.context, masks.image_of, layout)
    return embeddings, networks.predictor(embeddings, masks.context, masks.target, masks.offsets)


def summary(embeddings: Tensor, predictions: Tensor, masks: Masks, views: str) -> Tensor:
    """The mean embeddings that the VICReg terms see, at least fp32: [B, M, D] block means, or [B, D] context means."""
    if views == "target_blocks":
        return _precise(predictions).mean(dim=2)
    if masks.image_of is None:
        return _precise(embeddings).mean(dim=1)
    # of packed rows by a product: sums without atomics, and the same for any number of rows
    own = masks.image_of == torch.arange(len(predictions), device=embeddings.device)[:, None]  # [B, cap]
    return (own / own.sum(dim=1, keepdim=True)).to(_precise(embeddings).dtype) @ _precise(embeddings)


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


def forward_backward(networks: Networks, images: Tensor, masks: Sequence[Masks], weights: LossWeights) -> StepOutput:
    """Computes the loss of one batch and accumulates its gradients into the student's parameters.

    Several masks are micro-batches. The VICReg terms are statistics of the whole batch, so a sum over micro-batches
    would be another loss. Instead a first pass without gradient collects the mean embeddings, the terms are
    differentiated with respect to those, and the second pass carries that gradient through the networks (GradCache, Gao
    et al., 2021): the same gradient at the price of one more forward pass.

    Args:
        images: see `networks.vit.Encoder`; B images of this rank. With one dimension more, [2, ...], two views of
            them: the student sees the first, the target encoder the second.
        masks: on the images' device, for each micro-batch in turn. Where they list unions of targets, which
            `vicreg_views` context_target has no use for, only these target rows are computed.
    """
    context_images, target_images = images if images.ndim == 5 else (images, images)
    inputs = context_images.chunk(len(masks))
    with torch.no_grad(), networks.target_encoder.quantised():
        targets = [
            target_embeddings(networks.target_encoder, part, mask)
            for part, mask in zip(target_images.chunk(len(masks)), masks, strict=True)
        ]
    zero = torch.zeros((), device=images.device)
    terms, penalty = (zero, zero, zero), zero
    if len(masks) == 1:
        embeddings, predictions = student(networks, context_images, masks[0])
        # the terms' collectives run beside the prediction loss; autograd keeps to the streams of the forward pass
        side = _side_stream(images.device)
        with torch.cuda.stream(side):
            if networks.projector is not None:
                means = summary(embeddings, predictions, masks[0], weights.views)
                penalty, terms = regularisation(networks.projector, means, targets[0], weights)
        prediction = _prediction_loss(predictions, targets[0], masks[0], weights)
        if side is not None:
            torch.cuda.current_stream(images.device).wait_stream(side)
        (prediction + penalty).backward()
    else:
        grads: Sequence[Tensor | None] = [None] * len(masks)
        if networks.projector is not None:
            with torch.no_grad():
                outputs = (student(networks, *part) for part in zip(inputs, masks, strict=True))
                means = [summary(*output, mask, weights.views) for output, mask in zip(outputs, masks, strict=True)]
            whole = torch.cat(means).requires_grad_()
            penalty, terms = regularisation(networks.projector, whole, torch.cat(targets), weights)
            penalty.backward()
            assert whole.grad is not None
            grads = whole.grad.chunk(len(masks))
        done, prediction = [], zero
        for part, mask, target, grad in zip(inputs, masks, targets, grads, strict=True):
            embeddings, predictions = student(networks, part, mask)
            share = _prediction_loss(predictions, target, mask, weights) / len(masks)
            carried = zero if grad is None else (summary(embeddings, predictions, mask, weights.views) * grad).sum()
            (share + carried).backward()
            prediction = prediction + share.detach()
            done.append(predictions.detach())
        predictions = torch.cat(done)
    sim, std, cov = (term.detach() for term in terms)
    prediction, penalty = prediction.detach(), penalty.detach()
    return StepOutput(
        Terms(prediction + penalty, prediction, sim, std, cov), predictions.detach(),
        (targets[0] if len(targets) == 1 else torch.cat(targets)) if masks[0].union is None else None,
    )  # fmt: skip


def train_step(
    networks: Networks, optimizer: AdamW, weights: LossWeights, images: Tensor, masks: Sequence[Masks],
    momentum: float, *, graphed: bool = False,
) -> StepOutput:  # fmt: skip
    """A whole step on the device: loss and gradients of one batch, optimizer, and averages with `momentum`.

    graphed: for a CUDA graph: gradients keep their memory, and hyperparameters are those that the optimizer's
        `set_hyperparameters` last took to the device.
    """
    out = forward_backward(networks, images, masks, weights)
    optimizer.step(momentum=momentum, held=graphed)
    optimizer.zero_grad(set_to_none=not graphed)
    return out


def _prediction_loss(predictions: Tensor, targets: Tensor, masks: Masks, weights: LossWeights) -> Tensor:
    indices = masks.target if masks.target_slot is None else masks.target_slot
    return prediction_loss(
        predictions, targets, indices, weights.prediction, offsets=masks.union_offsets, impl=weights.impl
    )


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A second stream of a GPU that shares its batch statistics, waiting for what is queued so far; else None."""
    if device.type != "cuda" or world_size() == 1:
        return None
    stream = _stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
