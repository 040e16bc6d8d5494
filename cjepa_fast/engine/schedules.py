"""The length of a run, and its schedules as arrays indexed by step (I-JEPA, Assran et al., 2023, appendix A)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cjepa_fast.config import OptimConfig
from cjepa_fast.errors import UserError

MAX_STEPS = 10_000_000  # schedules take 24 bytes a step


class Length(NamedTuple):
    """Optimizer steps of a run, of an epoch and of the warm-up."""

    total: int
    per_epoch: int
    warmup: int


def count_steps(optim: OptimConfig, images: int) -> Length:
    """Count the steps of a run whose epochs show `images` images; an incomplete last batch is left out.

    Raises UserError if the images do not fill one batch, or for more than `MAX_STEPS`.
    """
    per_epoch = images // optim.batch_size
    if per_epoch == 0:
        raise UserError(f"optim.batch_size: {optim.batch_size} exceeds the {images} training images; use at most that")
    total = optim.steps if optim.steps is not None else optim.epochs * per_epoch
    if total > MAX_STEPS:
        key = "optim.epochs" if optim.steps is None else "optim.steps"
        raise UserError(f"{key}: makes a run of {total:,.3g} steps; use at most {MAX_STEPS:,}")
    warmup = round(min(optim.warmup_epochs * per_epoch, MAX_STEPS))
    return Length(total=max(1, round(total)), per_epoch=per_epoch, warmup=warmup)


class Schedules(NamedTuple):
    """Float64 arrays [steps]: the values in force during each step."""

    lr: NDArray[np.float64]
    weight_decay: NDArray[np.float64]
    ema: NDArray[np.float64]

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the values of `step` in the groups of `engine.optim.parameter_groups`; return the EMA momentum."""
        for group in optimizer.param_groups:
            group["lr"] = float(self.lr[step])
            group["weight_decay"] = float(self.weight_decay[step]) if group["decayed"] else 0.0
        return float(self.ema[step])


def schedules(optim: OptimConfig, length: Length) -> Schedules:
    """Compute learning rate, weight decay and EMA momentum of every step.

    The learning rate rises linearly from start_lr to lr during the warm-up, then follows a half cosine to final_lr.
    Weight decay follows a half cosine (the released code) or a line (the papers' text). EMA momentum is linear.

    Raises UserError if the warm-up does not end before the run.
    """
    if not 0 <= length.warmup < length.total:
        raise UserError(
            f"optim.warmup_epochs: warm-up of {length.warmup} steps does not fit a run of {length.total} steps; "
            "shorten it or train longer"
        )
    step = np.arange(length.total, dtype=np.float64)
    after = np.minimum(1, (step - length.warmup) / max(1.0, length.total - length.warmup))
    lr = np.where(
        step < length.warmup,
        optim.start_lr + (optim.lr - optim.start_lr) * step / max(1, length.warmup),
        optim.final_lr + (optim.lr - optim.final_lr) * (1 + np.cos(np.pi * after)) / 2,
    )
    progress = step / length.total
    bend = (1 - np.cos(np.pi * progress)) / 2 if optim.weight_decay_schedule == "cosine" else progress
    return Schedules(
        lr,
        optim.weight_decay + (optim.final_weight_decay - optim.weight_decay) * bend,
        optim.ema + (optim.final_ema - optim.ema) * progress,
    )
