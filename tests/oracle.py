"""The numerical oracle: a fast implementation may be little worse than plain torch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_no_worse(
    fn: Callable[..., Tensor], ref: Callable[..., Tensor], args: Sequence[Tensor], dtype: torch.dtype,
    factor: float = 2.0, ulps: float = 2.0,
) -> None:  # fmt: skip
    """Assert that `fn` errs little more than `ref` in `dtype` (the yardstick), against `ref` in fp64 (the truth).

    Compare output and the gradient of every argument, for a non-constant upstream gradient. Each of ours has the
    truth's shape, the type `dtype` and finite values, and its largest error is at most
        factor * (largest error of the yardstick) + ulps * eps(dtype) * (largest absolute true value).

    Args:
        fn, ref: functions of `args` that return one tensor of their arguments' dtype. Closures hold integer arguments,
            as all of `args` are differentiated.
        args: rounded to `dtype` first, so that all three runs start from the same values.
    """
    rounded = [arg.to(dtype) for arg in args]
    ours, yardstick = _run(fn, rounded, dtype), _run(ref, rounded, dtype)
    truth = _run(ref, rounded, torch.float64)
    for index, (our, their, true) in enumerate(zip(ours, yardstick, truth, strict=True)):
        assert our.shape == true.shape, f"tensor {index}: shape {our.shape}, truth {true.shape}"
        assert our.dtype == dtype, f"tensor {index}: {our.dtype}, expected {dtype}"
        assert our.isfinite().all(), f"tensor {index}: not finite"
        error, allowed = ((x.double() - true).abs().max().item() for x in (our, their))
        limit = factor * allowed + ulps * torch.finfo(dtype).eps * true.abs().max().item()
        assert error <= limit, (
            f"tensor {index} (0 is the output): error {error:.3g}, yardstick {allowed:.3g}, limit {limit:.3g}"
        )


def _run(f: Callable[..., Tensor], args: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [arg.to(dtype).clone().requires_grad_() for arg in args]
    output = f(*leaves)
    # from 1: sin(0) would multiply the gradients of a scalar by zero
    upstream = torch.arange(1, output.numel() + 1, dtype=torch.float64, device=output.device).sin()
    grads = torch.autograd.grad(output, leaves, upstream.view(output.shape).to(output.dtype))
    return [output.detach(), *grads]
