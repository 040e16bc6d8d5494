"""The interface of a training method: networks, and a loss in two parts.

A *local* loss is a mean over images, so micro-batches add up. A *batch* loss is a function of summaries, one for each
image, and needs those of the whole batch, over all micro-batches and processes. `cjepa_fast.engine.step` turns both
into exact gradients for any number of micro-batches; a method need not know of them.

Adding a method takes one file here, a line in `METHODS`, a preset, a truth in `cjepa_fast.reference` and a test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cjepa_fast.masks import Masks


class Forward(NamedTuple):
    """The forward pass of b images.

    summary: [b, ...] in fp32 at least, for the batch loss; None if the method has none.
    predictions: [b, M, Kt, D] of JEPAs, for the cosine gap; None of others.
    embeddings: [b, N, D], the judged encoder's tokens of whole images, for the health figures; None if the pass
        computed only a part of them. No gradient is needed.
    """

    summary: Tensor | None
    predictions: Tensor | None
    embeddings: Tensor | None


Loss = tuple[Tensor, tuple[Tensor, ...]]  # a scalar, and the values of its terms


class Method(nn.Module, ABC):
    """What learns: networks as child modules, and the loss of a batch.

    Children whose parameters need no gradient follow others by EMA, see `averages`. Transformer blocks (`Block`) of the
    children are compiled and sharded one by one.
    """

    local_terms: tuple[str, ...] = ()
    """Names of the local loss's terms, for the metrics (`loss_NAME`)."""
    batch_terms: tuple[str, ...] = ()
    """Names of the batch loss's terms; without names there is no batch loss."""
    views: int = 1
    """Views of each image that the feed delivers."""
    independent_views: bool = False
    """Each view has its own crop and flip; else views differ in colour alone."""
    masked: bool = False
    """The feed delivers masks."""
    needs_all_targets: bool = True
    """The loss needs the judged encoder's tokens of whole images, not of target patches alone."""

    @property
    @abstractmethod
    def judged(self) -> nn.Module:
        """The encoder that probes, health figures and exports see."""

    def averages(self) -> dict[Tensor, Tensor]:
        """Return the EMA of each parameter that has one."""
        return {}

    def targets(self, images: Sequence[Tensor], masks: Sequence[Masks | None]) -> list[Tensor | None]:
        """Compute what needs no gradient, for each micro-batch, once per step; none by default.

        `forward` and `local_loss` get the result of their micro-batch.
        """
        return [None] * len(images)

    @abstractmethod
    def forward(self, images: Tensor, masks: Masks | None, targets: Tensor | None) -> Forward:
        """Run the networks.

        Args:
            images: uint8 [b, H, W, 3], or with several views [V, b, H, W, 3].
            masks: of these images, on their device; None unless `masked`.
            targets: the result of `targets` for these images.
        """

    def local_loss(self, out: Forward, masks: Masks | None, targets: Tensor | None) -> Loss | None:
        """Compute the mean loss over these images, and its terms; none by default."""
        return None

    def batch_loss(self, summary: Tensor) -> Loss:
        """Compute the loss of the whole batch's summaries [B, ...] of this process, and its unweighted terms.

        Statistics are those of all processes, see `cjepa_fast.distributed`.
        """
        raise NotImplementedError(f"{type(self).__name__} names terms of a batch loss, but computes none")


def precise(x: Tensor) -> Tensor:
    """Return `x` in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
