"""Linear layers in float8, without gradient: scale rows to the type's range, multiply, scale back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_fast.errors import UserError

FLOAT8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa, no infinity
LARGEST = torch.finfo(FLOAT8).max


def require_float8(device: torch.device) -> None:
    """Raise UserError unless `device` multiplies in float8; to ask before a run."""
    wanted = "model.target_precision: float8 needs a GPU of capability 8.9 or more"
    if device.type != "cuda":
        raise UserError(f"{wanted}, the run is on {device}; use same")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise UserError(f"{wanted}, this one has {major}.{minor}; use same")


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x [..., K] to float8 [..., K] with a scale fp32 [..., 1] for each row: x is about values * scale.

    The largest magnitude of a row becomes the type's largest, so a row's rounding depends on that row alone, and
    results do not depend on the division of a batch. An element's error is at most a sixteenth of the element, or 2^-10
    of the scale for elements under 2^-6 of the scale. Rows of zeros stay zeros. A row with infinities or NaN gets NaN.
    """
    scale = x.abs().amax(dim=-1, keepdim=True).float() / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def float8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """Compute x W^T + b from rows quantised here and weights quantised before; no gradient.

    Args:
        x: [..., K]; on GPUs bf16, with K and N multiples of 16.
        weight, scale: float8 [N, K] and fp32 [N, 1] of `quantise_rows`.
        bias: [N] in x's dtype.
        impl: "eager" multiplies the values in fp32. Any other runs torch._scaled_mm, on the float8 tensor cores of GPUs
            of capability 8.9 or more, which sum less precisely than fp32.

    Returns [..., N] in x's dtype.
    """
    rows, row_scale = quantise_rows(x.flatten(0, -2))
    if impl == "eager":
        out = F.linear(rows.float() * row_scale, weight.float() * scale) + bias.float()
    else:
        out = torch._scaled_mm(
            rows, weight.t(), row_scale, scale.t(), bias.bfloat16(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return out.to(x.dtype).unflatten(0, x.shape[:-1])
