"""Linear layers in float8, without gradient: rows scaled to the type's range, multiplied, and scaled back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_fast.errors import UserError

FLOAT8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa, no infinity
LARGEST = torch.finfo(FLOAT8).max


def require_float8(device: torch.device) -> None:
    """Raises UserError unless `device` multiplies in float8: to ask before a run."""
    wanted = "model.target_precision: float8 needs a GPU of capability 8.9 or more"
    if device.type != "cuda":
        raise UserError(f"{wanted}, the run is on {device}; use same")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise UserError(f"{wanted}, this one has {major}.{minor}; use same")


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] as float8 [..., K] and its scale, fp32 [..., 1], that multiplies it back.

    The largest magnitude of a row becomes the type's largest, so a row's rounding depends on nothing beside the row:
    results do not depend on how a batch is divided. Elements err by a sixteenth of themselves at most, or by 2^-10 of
    the scale if they are under 2^-6 of it. Rows of zeros stay zeros; a row that is not finite becomes NaN somewhere.
    """
    scale = x.abs().amax(dim=-1, keepdim=True).float() / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def float8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """x W^T + b of rows that are quantised here and weights that are already, in x's dtype; no gradient.

    Args:
        x: [..., K], bf16 for GPUs. K and N are multiples of 16 there.
        weight, scale: float8 [N, K] and fp32 [N, 1] of `quantise_rows`.
        bias: [N] in x's dtype.
        impl: "eager" multiplies the values in fp32, all else by torch._scaled_mm, which keeps float8 for the tensor
            cores of GPUs of capability 8.9 and sums less precisely than fp32 there.
    """
    rows, row_scale = quantise_rows(x.flatten(0, -2))
    if impl == "eager":
        out = F.linear(rows.float() * row_scale, weight.float() * scale) + bias.float()
    else:
        out = torch._scaled_mm(
            rows, weight.t(), row_scale, scale.t(), bias.bfloat16(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return out.to(x.dtype).unflatten(0, x.shape[:-1])
