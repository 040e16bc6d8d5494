"""AdamW with averages (EMA), its parameter groups, and the schedules of I-JEPA as arrays indexed by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cjepa_fast import ops
from cjepa_fast.errors import UserError

# torch's step without the hooks around it: they run around the subclass's step already
_torch_step = inspect.unwrap(torch.optim.AdamW.step)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW that also moves averages (EMA) of its parameters, in one pass over memory where Triton runs.

    State and state dict are those of torch.optim.AdamW(fused=True), whatever `impl` made them; the averages belong to
    their network and are not part of it. Gradients that are not finite reach the parameters, as in torch.

    Args:
        params, lr, betas, eps, weight_decay: as for torch.optim.AdamW. DTensors of FSDP2 are updated shard by shard.
        averages: from a parameter to its average, a tensor of the same shape and sharding.
        copies: from a parameter or an average to a bf16 or fp16 tensor of its shape, to which every step rounds it.
        impl: "triton" is `cjepa_fast.ops.adamw_ema`, "eager" torch's fused step and then torch._foreach_lerp_.

    Raises UserError if impl is unknown or cannot run, ValueError if an average or a copy does not fit.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, averages: Mapping[Tensor, Tensor] | None = None,
        copies: Mapping[Tensor, Tensor] | None = None, impl: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        averages, copies = averages or {}, copies or {}
        trained = [parameter for group in self.param_groups for parameter in group["params"]]
        for tensor, twin in (*averages.items(), *copies.items()):
            ours, theirs = tuple(_local(tensor).shape), tuple(_local(twin).shape)
            if ours != theirs:
                raise ValueError(f"an average or copy of {ours} elements must have that shape, got {theirs}")
        if set(copies) - {*trained, *averages.values()}:
            raise ValueError("copies: there is one of a tensor that is neither a parameter nor an average")
        self._averages = {parameter: _local(average) for parameter, average in averages.items()}
        self._copies = {tensor: _local(copy) for tensor, copy in copies.items()}
        self._average_copies = {p: self._copies[average] for p, average in averages.items() if average in copies}
        self._followed = [_local(parameter) for parameter in averages]
        self._copied = [_local(tensor) for tensor in copies]

        local = [*map(_local, trained), *self._averages.values()]
        obstacle = None
        if others := sorted({str(tensor.dtype) for tensor in local} - {"torch.float32"}):
            obstacle = f"parameters or averages are {' and '.join(others)}, not fp32"
        elif not all(tensor.is_contiguous() for tensor in local):
            obstacle = "a parameter or an average is not contiguous"
        self._impl, self._device = impl, local[0].device
        self._fuses = ops.choose("adamw_ema", impl, self._device.type, obstacle) == "triton"
        if self._fuses:
            self._step_supports_amp_scaling = False  # torch's fused step would undo a GradScaler's factor, ours not
        self._hyperparameters = torch.empty(0, 6, dtype=torch.float64, device=self._device)
        self.refresh_copies()

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None, *, momentum: float | None = None, held: bool = False
    ) -> float | None:
        """Updates the parameters, then average = momentum * average + (1 - momentum) * parameter; None: no averages.

        held: go by what `set_hyperparameters` last took to the device, for a CUDA graph, before whose every replay it
            is to be called (see `cjepa_fast.ops.adamw_ema`, too). The groups' values and that of `momentum` are not
            looked at. Only where `fuses`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._fuses:
            if not held:
                self.set_hyperparameters(momentum)
            self._fused_step(momentum, held)
        else:
            assert not held, "plain torch takes hyperparameters from the host"
            _torch_step(self)
            if momentum is not None:
                torch._foreach_lerp_(list(self._averages.values()), self._followed, 1 - momentum)
            self.refresh_copies()
        return loss

    def _fused_step(self, momentum: float | None, held: bool) -> None:
        columns: tuple[list[Any], ...] = ([], [], [], [], [])
        groups: list[int] = []
        for index, group in enumerate(self.param_groups):
            if group["amsgrad"] or group["maximize"]:
                raise ValueError(f"parameter group {index}: amsgrad and maximize are not offered")
            self._init_group(group, *columns[:4], [], columns[4])
            groups += [index] * (len(columns[0]) - len(groups))

        def twins(of: Mapping[Tensor, Tensor]) -> list[Tensor | None]:
            return [of.get(parameter) for parameter in columns[0]] if of else []

        averages, average_copies = (self._averages, self._average_copies) if momentum is not None else ({}, {})
        parameters, grads, exp_avgs, exp_avg_sqs, steps = ([_local(tensor) for tensor in column] for column in columns)
        ops.adamw_ema(
            parameters, [grad.contiguous() for grad in grads], exp_avgs, exp_avg_sqs, steps, self._hyperparameters,
            groups, averages=twins(averages), copies=twins(self._copies), average_copies=twins(average_copies),
            impl=self._impl,
        )  # fmt: skip
        # an average follows a parameter without gradient, too
        updated = set(columns[0])
        if alone := [parameter for parameter in averages if parameter not in updated]:
            assert momentum is not None and not held, "a parameter without gradient"
            torch._foreach_lerp_([averages[p] for p in alone], [_local(p) for p in alone], 1 - momentum)
            self.refresh_copies()

    def set_hyperparameters(self, momentum: float | None) -> None:
        """Takes the groups' values and the averages' momentum to the device, without waiting for it."""
        kept = 1.0 if momentum is None else momentum
        rows = [(g["lr"], g["weight_decay"], *g["betas"], g["eps"], kept) for g in self.param_groups]
        values = torch.tensor(rows, dtype=torch.float64)
        if self._device.type != "cpu":  # from pinned memory, the only kind the host need not wait for
            values = values.pin_memory()
        if self._hyperparameters.shape != values.shape:
            self._hyperparameters = torch.empty(values.shape, dtype=values.dtype, device=self._device)
        self._hyperparameters.copy_(values, non_blocking=True)

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Rounds the parameters and averages to their copies: for after weights were loaded; a step does it itself."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), self._copied)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What torch calls to load a state dict: one of torch.optim.AdamW(fused=None) keeps its steps on the CPU."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["fused"], group["foreach"] = True, None
            for parameter in group["params"]:
                if moments := self.state.get(parameter):
                    moments["step"] = moments["step"].to(parameter.device, torch.float32)


def fuses(impl: str, device: torch.device) -> bool:
    """Whether `AdamW(impl=impl)` runs the fused kernel for fp32 parameters there, which takes bf16 gradients, too."""
    return ops.choose("adamw_ema", impl, device.type, None) == "triton"


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def parameter_groups(networks: nn.Module) -> list[dict[str, Any]]:
    """Groups for AdamW: weight decay for matrices and the mask token, none for biases and other 1-D parameters."""
    trained = [parameter for parameter in networks.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "decayed": True},
        {"params": [p for p in trained if p.ndim <= 1], "decayed": False, "weight_decay": 0.0},
    ]


class Schedules(NamedTuple):
    """float64 arrays [steps]: the value in force during step i."""

    lr: NDArray[np.float64]
    weight_decay: NDArray[np.float64]
    ema: NDArray[np.float64]

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Gives the groups of `parameter_groups` their values for `step`; returns the averages' momentum."""
        for group in optimizer.param_groups:
            group["lr"] = float(self.lr[step])
            group["weight_decay"] = float(self.weight_decay[step]) if group["decayed"] else 0.0
        return float(self.ema[step])


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
