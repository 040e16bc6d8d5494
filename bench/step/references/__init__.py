"""Trainers that do the same work as ours, written here from the papers and the published description.

`eager` trains as the published trainer does. `tuned` is what a strong engineer would write today without own kernels.
`external` wraps foreign code. All load the state dict of our networks and compute the same loss.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bench.flop import projector_widths
from cjepa_fast.config import Config
from cjepa_fast.masks import Masks

Mark = Callable[[str], None]  # called with the name of a phase at its end
Batch = tuple[Any, ...]


def no_mark(phase: str) -> None:
    """Mark nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The values in force during every step that is timed."""

    lr: float = 1e-3
    weight_decay: float = 0.04
    ema: float = 0.996
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class Drawn(NamedTuple):
    """A batch on the CPU: bytes [B, H, W, 3], its masks, and the step and the sample ids that the masks belong to."""

    images: Tensor
    masks: Masks
    step: int
    ids: range


class Trainer(Protocol):
    """One way to train."""

    @property
    def networks(self) -> nn.Module:
        """With `encoder`, `predictor`, `target_encoder` and `projector`, which may be None."""
        ...

    def batch(self, drawn: Drawn) -> Batch:
        """Return the batch as the trainer's own loader delivers it, on its device; not timed."""
        ...

    def gradients(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        """Return the loss of a batch; leave the gradients in the trained parameters."""
        ...

    def update(self) -> None:
        """Apply optimizer and EMA; leave no gradients."""
        ...

    def step(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        """Take a whole step, with all that the trainer does every step; return the loss."""
        ...


class Padded(NamedTuple):
    """Contexts of a batch side by side, int64 [B, K], and the mask of real tokens, bool [B, K] (None: all)."""

    context: Tensor
    valid: Tensor | None


def padded(masks: Masks) -> Padded:
    """Pad packed contexts to the longest, for networks without packed attention; return other masks as they are."""
    if masks.offsets is None:
        return Padded(masks.context.long(), None)
    lengths = masks.offsets.diff().long().cpu()
    slots = torch.arange(int(lengths.max()))
    valid = slots < lengths[:, None]
    context = torch.zeros(valid.shape, dtype=torch.long)
    context[valid] = masks.context[: int(lengths.sum())].long().cpu()
    return Padded(context, valid)


def loss_weights(config: Config) -> tuple[float, float, float]:
    """Return the multiplied-out weights of VICReg's sim, std and cov terms."""
    loss = config.loss
    sim, std, cov = (loss.vicreg_weight * coefficient for coefficient in loss.vicreg_coefficients)
    return sim, std, cov


def parameter_groups(networks: nn.Module) -> list[dict[str, Any]]:
    """Return AdamW's groups: weight decay for matrices and the mask token, none for other parameters."""
    trained = [parameter for parameter in networks.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "decayed": True},
        {"params": [p for p in trained if p.ndim <= 1], "decayed": False},
    ]


class Projector(nn.Module):
    """Linear layers without bias, batch norm by batch statistics and ReLU between them: [rows, width] -> [rows, D]."""

    def __init__(self, width: int, widths: Sequence[int]) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for before, after in itertools.pairwise((width, *widths)):
            modules += [
                nn.Linear(before, after, bias=False),
                nn.BatchNorm1d(after, track_running_stats=False),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*modules[:-2])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def build_projector(config: Config, width: int) -> Projector | None:
    """Return the projector; None where the loss does not need one."""
    return Projector(width, projector_widths(config)) if config.method == "cjepa" else None
