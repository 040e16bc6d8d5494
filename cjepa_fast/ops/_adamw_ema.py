"""AdamW, the averages (EMA) of the parameters and rounded copies of both, in one pass over memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from cjepa_fast import reference
from cjepa_fast.ops._choice import choose


@torch.no_grad()
def adamw_ema(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], hyperparameters: Tensor, groups: Sequence[int], *,
    averages: Sequence[Tensor | None] = (), copies: Sequence[Tensor | None] = (),
    average_copies: Sequence[Tensor | None] = (), impl: str = "auto",
) -> None:  # fmt: skip
    """Take one step of AdamW, as torch.optim.AdamW does, in place for T tensors of any shapes; then update averages:

        average = momentum * average + (1 - momentum) * updated parameter

    Nothing waits for the device, so a CUDA graph may hold the step. One step must precede the capture, and no tensor
    may move after that step: keep the gradients' memory by zero_grad(set_to_none=False). A replayed step reads the
    current values of `hyperparameters`.

    Args:
        parameters, exp_avgs, exp_avg_sqs: T contiguous fp32 tensors, which may be empty, as local shards can be.
        grads: T contiguous tensors of the same shapes, fp32 or bf16.
        steps: T fp32 scalars [], the numbers of steps before this one; incremented here.
        hyperparameters: fp64 [groups, 6] on the parameters' device: learning rate, weight decay, beta 1, beta 2, eps
            and the averages' momentum.
        groups: for each parameter, its row of `hyperparameters`.
        averages: empty, or for each parameter an fp32 tensor of its shape or None.
        copies, average_copies: likewise bf16 or fp16 tensors, all of one type, for the rounded parameter and average.
        impl: see `cjepa_fast.ops`. The Triton kernel takes fp32 parameters, is deterministic, and averages as
            torch.lerp does.

    Raises UserError if impl is unknown or cannot run, ValueError if the tensors do not match.
    """
    if not parameters:
        return
    device, dtype = parameters[0].device, parameters[0].dtype
    tensors = Tensors(parameters, grads, exp_avgs, exp_avg_sqs, averages, copies, average_copies, steps)
    unsupported = None if dtype == torch.float32 else f"parameters of {dtype} are not fp32"
    if choose("adamw_ema", impl, device.type, unsupported) == "eager":
        _check(tensors, hyperparameters, groups)
        _adamw_ema_eager(tensors, hyperparameters, groups)
    elif torch.compiler.is_compiling():
        _check(tensors, hyperparameters, groups)
        # An operator's lists hold tensors only, so an empty one stands for None.
        filled = ([parameters[0].new_zeros(0) if tensor is None else tensor for tensor in column] for column in tensors)
        _adamw_ema(*filled, hyperparameters, list(groups))  # pyright: ignore[reportCallIssue]
    else:  # not through the dispatcher, which takes 3 ms for 400 parameters and their averages
        _launch(tensors, hyperparameters, groups)
        changed = chain(parameters, exp_avgs, exp_avg_sqs, steps, averages, copies, average_copies)
        torch.autograd.graph.increment_version([tensor for tensor in changed if tensor is not None])


class Tensors(NamedTuple):
    """The arguments of `adamw_ema`, in the order of the kernel's table."""

    parameters: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    averages: Sequence[Tensor | None]
    copies: Sequence[Tensor | None]
    average_copies: Sequence[Tensor | None]
    steps: Sequence[Tensor]


def _check(tensors: Tensors, hyperparameters: Tensor, groups: Sequence[int]) -> None:
    """Raise ValueError that names the first tensor that does not fit."""
    count, device, dtype = len(tensors.parameters), tensors.parameters[0].device, tensors.parameters[0].dtype
    low = (torch.bfloat16, torch.float16)
    precise = ((dtype,), (dtype, torch.bfloat16), (dtype,), (dtype,), (dtype,), low, low, (torch.float32,))
    for name, column, dtypes in zip(Tensors._fields, tensors, precise, strict=True):
        optional = name in ("averages", "copies", "average_copies")
        if len(column) != count and (column or not optional):
            raise ValueError(f"{count} parameters, but {len(column)} {name}")
        for index, (tensor, parameter) in enumerate(zip(column, tensors.parameters, strict=False)):
            if tensor is None:
                if optional:
                    continue
                raise ValueError(f"{name}[{index}] is None")
            shape = () if name == "steps" else tuple(parameter.shape)
            if tensor.shape != shape or tensor.device != device or tensor.dtype not in dtypes:
                wanted = f"{shape} {' or '.join(map(str, dtypes))} on {device}"
                found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                raise ValueError(f"{name}[{index}] must be {wanted}, got {found}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{index}] must be contiguous, got strides {tensor.stride()} for {shape}")
    if len(types := {t.dtype for t in chain(tensors.copies, tensors.average_copies) if t is not None}) > 1:
        raise ValueError(f"copies must be of one type, got {' and '.join(sorted(map(str, types)))}")
    averages = tensors.averages or [None] * count
    if any(copy is not None and averages[index] is None for index, copy in enumerate(tensors.average_copies)):
        raise ValueError("average_copies: there is no average to copy")
    kind = (hyperparameters.shape[1:], hyperparameters.dtype, hyperparameters.device)
    if kind != ((6,), torch.float64, device) or not hyperparameters.is_contiguous():
        found = f"{tuple(hyperparameters.shape)} {hyperparameters.dtype} on {hyperparameters.device}"
        raise ValueError(f"hyperparameters must be (groups, 6) torch.float64 on {device}, contiguous, got {found}")
    if len(groups) != count or not all(0 <= group < len(hyperparameters) for group in groups):
        raise ValueError(f"groups must be {count} rows of {len(hyperparameters)} hyperparameters, got {list(groups)}")


def _adamw_ema_eager(tensors: Tensors, hyperparameters: Tensor, groups: Sequence[int]) -> None:
    columns = (column or [None] * len(groups) for column in tensors)
    for p, g, m, v, average, copy, average_copy, step, group in zip(*columns, groups, strict=True):
        lr, weight_decay, beta1, beta2, eps, momentum = hyperparameters[group].unbind()
        step += 1
        updated = reference.adamw(
            p, g.to(p.dtype), (m, v), step.double(), lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps
        )  # fmt: skip
        for old, new in zip((p, m, v), (updated[0], *updated[1]), strict=True):
            old.copy_(new)
        if average is not None:
            average.lerp_(p, (1 - momentum).to(p.dtype))
        if copy is not None:
            copy.copy_(p)
        if average_copy is not None:
            average_copy.copy_(average)


_checked: deque[object] = deque(maxlen=8)  # arguments of the last launches, which are checked once


def _launch(tensors: Tensors, hyperparameters: Tensor, groups: Sequence[int]) -> None:
    from cjepa_fast.kernels import adamw_ema as kernel

    none = [0] * len(tensors.parameters)
    addresses = tuple(chain.from_iterable(
        [0 if tensor is None else tensor.data_ptr() for tensor in column] if column else none for column in tensors
    ))  # fmt: skip
    sizes = tuple(tensor.numel() for tensor in tensors.parameters)
    grad_types = tuple(tensor.dtype for tensor in tensors.grads)
    copied = (tensor for tensor in chain(tensors.copies, tensors.average_copies) if tensor is not None)
    copy_type = next((tensor.dtype for tensor in copied), None)
    arguments = (addresses, sizes, grad_types, copy_type, tuple(groups))
    table = (hyperparameters.shape, hyperparameters.stride(), hyperparameters.dtype, hyperparameters.device)
    if (arguments, table) not in _checked:
        _check(tensors, hyperparameters, groups)
        _checked.append((arguments, table))
    kernel.update(*arguments, hyperparameters)


@torch.library.custom_op(
    "cjepa::adamw_ema",
    mutates_args=("parameters", "exp_avgs", "exp_avg_sqs", "averages", "copies", "average_copies", "steps"),
)
def _adamw_ema(
    parameters: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    averages: list[Tensor], copies: list[Tensor], average_copies: list[Tensor], steps: list[Tensor],
    hyperparameters: Tensor, groups: list[int],
) -> None:  # fmt: skip
    optional = ([t if t.numel() else None for t in column] for column in (averages, copies, average_copies))
    tensors = Tensors(parameters, grads, exp_avgs, exp_avg_sqs, *optional, steps)  # pyright: ignore[reportCallIssue]
    _launch(tensors, hyperparameters, groups)


@_adamw_ema.register_fake
def _(*args: object) -> None:
    return None
