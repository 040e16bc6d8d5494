"""Trainers that do the work of ours, to time beside it: written here from the papers and the published description.

`eager` trains the way the published trainer does, `tuned` the way a strong engineer would write it today without
kernels of his own, `external` wraps code that is not ours. All take one state dict, with the names of
`cjepa_fast.engine.step.Networks`, and compute the same loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cjepa_fast.config import Config
from cjepa_fast.masks import Masks

Mark = Callable[[str], None]  # called with a phase's name where it ends
Batch = tuple[Any, ...]


def no_mark(phase: str) -> None:
    """Marks nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The values in force during every step that is timed."""

    lr: float = 1e-3
    weight_decay: float = 0.04
    ema: float = 0.996


class Trainer(Protocol):
    """One way to train."""

    @property
    def networks(self) -> nn.Module:
        """With `encoder`, `predictor`, `target_encoder` and `projector`, which may be None."""
        ...

    def batch(self, images: Tensor, masks: Masks) -> Batch:
        """What its own loader hands over, on its device, from bytes [B, H, W, 3] and masks; not timed."""
        ...

    def gradients(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        """Loss of a batch; leaves the gradients of what is trained."""
        ...

    def update(self) -> None:
        """Optimizer and EMA; leaves no gradients."""
        ...

    def step(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        """Both, and what else it does every step; returns the loss."""
        ...


class Padded(NamedTuple):
    """Contexts of a batch side by side: int64 [B, K], and which tokens are real, [B, K] bool (None: all)."""

    context: Tensor
    valid: Tensor | None


def padded(masks: Masks) -> Padded:
    """Packed contexts cut apart and padded to the longest, as who has no packed attention must; others as they are."""
    if masks.offsets is None:
        return Padded(masks.context.long(), None)
    lengths = masks.offsets.diff().long().cpu()
    slots = torch.arange(int(lengths.max()))
    valid = slots < lengths[:, None]
    context = torch.zeros(valid.shape, dtype=torch.long)
    context[valid] = masks.context[: int(lengths.sum())].long().cpu()
    return Padded(context, valid)


def loss_weights(config: Config) -> tuple[float, float, float]:
    """Multiplied-out weights of VICReg's sim, std and cov terms."""
    loss = config.loss
    return tuple(loss.vicreg_weight * weight for weight in (loss.sim_weight, loss.std_weight, loss.cov_weight))  # pyright: ignore[reportReturnType]


class Projector(nn.Module):
    """Linear layers without bias, batch norm by batch statistics and ReLU between them: [rows, width] -> [rows, D]."""

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for index in range(layers):
            modules.append(nn.Linear(width if index == 0 else hidden, hidden, bias=False))
            if index < layers - 1:
                modules += [nn.BatchNorm1d(hidden, track_running_stats=False), nn.ReLU()]
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def build_projector(config: Config, width: int) -> Projector | None:
    """None where it has no use."""
    if not config.loss.vicreg_weight:
        return None
    return Projector(width, config.loss.projector_width or width, config.loss.projector_layers)
