"""Checks that several operations share."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = (torch.int16, torch.int32, torch.int64)


def unsupported(*floats: Tensor) -> str | None:
    """Return why Triton kernels cannot take floating tensors of these dtypes; None if they can."""
    other = {str(tensor.dtype) for tensor in floats} - {"torch.float32", "torch.bfloat16", "torch.float16"}
    return f"dtypes {', '.join(sorted(other))} are not fp32, bf16 or fp16" if other else None


def check_tensors(device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ValueError if a tensor is on another device, or one called "...indices" has no integer dtype."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")
        if name.endswith("indices") and tensor.dtype not in _INTEGERS:
            raise ValueError(f"{name} is {tensor.dtype}, want int16, int32 or int64")


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
