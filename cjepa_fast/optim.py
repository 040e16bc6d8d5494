"""AdamW's parameter groups and the schedules of I-JEPA as arrays indexed by step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cjepa_fast.errors import UserError


def parameter_groups(networks: nn.Module) -> list[dict[str, Any]]:
    """Groups for AdamW: weight decay for matrices and the mask token, none for biases and other 1-D parameters."""
    trained = [parameter for parameter in networks.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "decayed": True},
        {"params": [p for p in trained if p.ndim <= 1], "decayed": False, "weight_decay": 0.0},
    ]


def local_tensors(parameters: list[nn.Parameter]) -> list[Tensor]:
    """This rank's shards of FSDP2 parameters, or the parameters' own data: what in-place updates work on."""
    return [p._local_tensor if isinstance(p, DTensor) else p.detach() for p in parameters]


class Schedules(NamedTuple):
    """float64 arrays [steps]: the value in force during step i."""

    lr: NDArray[np.float64]
    weight_decay: NDArray[np.float64]
    ema: NDArray[np.float64]


def schedules(
    steps: int, warmup_steps: int, *, lr: float, start_lr: float, final_lr: float, weight_decay: float,
    final_weight_decay: float, weight_decay_schedule: str = "cosine", ema: float = 0.996, final_ema: float = 1.0,
    schedule_scale: float = 1.0,
) -> Schedules:  # fmt: skip
    """Learning rate, weight decay and EMA momentum of a run of `steps` optimizer steps.

    lr rises linearly from `start_lr` to `lr` over `warmup_steps`, then follows a half cosine to `final_lr`. Weight
    decay goes from first to last value along a half cosine (the I-JEPA code) or a line (the papers' text). EMA momentum
    is linear. All but the warm-up are laid out over `schedule_scale` * steps and cut at the end (I-JEPA: ipe_scale).

    Raises UserError if the warm-up does not end before the run.
    """
    if not 0 <= warmup_steps < steps:
        raise UserError(
            f"optim.warmup_epochs: warm-up of {warmup_steps} steps does not fit a run of {steps} steps; "
            "shorten it or train longer"
        )
    step = np.arange(steps, dtype=np.float64)
    length = max(1.0, schedule_scale * steps)
    cosine = (1 + np.cos(np.pi * np.minimum(1, (step - warmup_steps) / max(1.0, length - warmup_steps)))) / 2
    lrs = np.where(
        step < warmup_steps,
        start_lr + (lr - start_lr) * step / max(1, warmup_steps),
        final_lr + (lr - final_lr) * cosine,
    )
    progress = step / length
    bend = (1 - np.cos(np.pi * progress)) / 2 if weight_decay_schedule == "cosine" else progress
    return Schedules(lrs, weight_decay + (final_weight_decay - weight_decay) * bend, ema + (final_ema - ema) * progress)
