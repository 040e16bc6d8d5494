"""AdamW with averages (EMA) of its parameters, and its parameter groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cjepa_fast import ops

# torch's step without its hooks, which already run around the subclass's step
_torch_step = inspect.unwrap(torch.optim.AdamW.step)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW that also moves averages (EMA) of its parameters, with Triton in one pass over memory.

    State and state dict are those of torch.optim.AdamW(fused=True) for every `impl`. The averages belong to their
    network, not to the state dict. Gradients that are not finite reach the parameters, as in torch.

    Args:
        params, lr, betas, eps, weight_decay: as for torch.optim.AdamW. DTensors of FSDP2 are updated shard by shard.
        averages: the average of a parameter, a tensor of the same shape and sharding.
        copies: the bf16 or fp16 copy of a parameter or an average, rewritten by every step.
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
            self._step_supports_amp_scaling = False  # torch's fused step undoes a GradScaler's factor, ours does not
        self._hyperparameters = torch.empty(0, 6, dtype=torch.float64, device=self._device)
        self.refresh_copies()

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None, *, momentum: float | None = None, held: bool = False
    ) -> float | None:
        """Update the parameters, then average = momentum * average + (1 - momentum) * parameter; None: no averages.

        held: for a CUDA graph: use the values that `set_hyperparameters` last copied to the device, and ignore those of
            the groups and of `momentum`. Call `set_hyperparameters` before each replay. Needs the fused kernel.
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
            if momentum is not None and self._averages:
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
        # The average of a parameter without gradient moves, too.
        updated = set(columns[0])
        if alone := [parameter for parameter in averages if parameter not in updated]:
            assert momentum is not None and not held, "a parameter without gradient"
            torch._foreach_lerp_([averages[p] for p in alone], [_local(p) for p in alone], 1 - momentum)
            self.refresh_copies()

    def set_hyperparameters(self, momentum: float | None) -> None:
        """Copy the groups' values and the averages' momentum to the device, without waiting for the device."""
        kept = 1.0 if momentum is None else momentum
        rows = [(g["lr"], g["weight_decay"], *g["betas"], g["eps"], kept) for g in self.param_groups]
        values = torch.tensor(rows, dtype=torch.float64)
        if self._device.type != "cpu":  # the host need not wait for a copy from pinned memory
            values = values.pin_memory()
        if self._hyperparameters.shape != values.shape:
            self._hyperparameters = torch.empty(values.shape, dtype=values.dtype, device=self._device)
        self._hyperparameters.copy_(values, non_blocking=True)

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Round the parameters and averages to their copies, after weights were loaded; a step does so itself."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), self._copied)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Accept a state dict of torch.optim.AdamW(fused=None), whose step counters lie on the CPU."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["fused"], group["foreach"] = True, None
            for parameter in group["params"]:
                if moments := self.state.get(parameter):
                    moments["step"] = moments["step"].to(parameter.device, torch.float32)


def fuses(impl: str, device: torch.device) -> bool:
    """Return whether `AdamW(impl=impl)` runs the fused kernel there; the kernel takes bf16 gradients, too."""
    return ops.choose("adamw_ema", impl, device.type, None) == "triton"


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def parameter_groups(networks: nn.Module) -> list[dict[str, Any]]:
    """Group trained parameters: weight decay for matrices and the mask token, none for biases and other 1-D ones."""
    trained = [parameter for parameter in networks.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "decayed": True},
        {"params": [p for p in trained if p.ndim <= 1], "decayed": False, "weight_decay": 0.0},
    ]
