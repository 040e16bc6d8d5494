"""Linear layers: on a CPU in fp32 by oneDNN, faster there than torch's own linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from cjepa_fast.errors import UserError
from cjepa_fast.ops._choice import announce


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, impl: str = "auto"
) -> Tensor:  # fmt: skip
    """Compute x weight^T + bias, as torch.nn.functional.linear does; differentiable once.

    torch computes fp32 products on a CPU with MKL. oneDNN, which torch ships too, was faster for the output and the
    gradient of x, except for products of a tenth of a millisecond (docs/log.md). MKL was faster for the gradient of the
    weight, which stays with MKL.

    Args:
        x: [..., K], any strides.
        weight, bias: [D, K] and [D], of x's dtype.
        gelu: apply the exact (erf) GELU, fused into the product where no gradient needs the GELU's input.
        impl: "eager" runs torch's layer. "auto" and "triton" run oneDNN for fp32 on a CPU, uncompiled, else torch's
            layer. There is no Triton kernel.

    Returns [..., D].

    Raises UserError if impl is unknown.
    """
    # Inductor accepts oneDNN's operation only with weights that Inductor packed, so torch's layer is compiled.
    if choose_linear(impl, x.device.type, x.dtype) == "eager" or x.numel() == 0 or torch.compiler.is_compiling():
        out = F.linear(x, weight, bias)
        return F.gelu(out) if gelu else out
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Any = _Linear.apply(rows, weight, bias)
        out = F.gelu(out) if gelu else out
    else:
        out = _product(rows, weight, bias, "gelu" if gelu else "none")
    return out.view(*x.shape[:-1], -1)


def choose_linear(impl: str, device: str, dtype: torch.dtype) -> str:
    """Return "onednn" or "eager", whichever runs; log oneDNN once."""
    if impl not in ("auto", "triton", "eager"):
        raise UserError(f"unknown impl {impl!r} for linear; known: auto, triton, eager")
    if device != "cpu":
        return "eager"  # not logged: there is one library
    if impl == "eager" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return "eager"
    announce("linear", "oneDNN", "fp32 on a CPU")
    return "onednn"


choose_linear._dynamo_marked_constant = True  # type: ignore[attr-defined]  (see `_choice.choose`)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none")  # of GELU: no tanh


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = upstream, ctx.saved_tensors
        grad = grad.contiguous()
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if of_x else None,
            grad.t() @ x if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flop(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]
