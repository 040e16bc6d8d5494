"""VICReg's variance and covariance terms over the batch of all ranks: one symmetric product forward, one backward."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cjepa_fast.distributed import gather_rows, world_size
from cjepa_fast.errors import UserError
from cjepa_fast.ops._checks import unsupported
from cjepa_fast.ops._choice import choose

STD_TARGET = 1.0  # gamma, C-JEPA appendix C.1
STD_EPS = 1e-4  # not given by C-JEPA; VICReg's public code
_FLOP_PER_BYTE = 2000  # FLOP of a GPU in the time of a byte between GPUs: 600 TFLOP/s, 300 GB/s


def variance_covariance(z: Tensor, *, form: str = "auto", impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Compute VICReg's variance and covariance terms of each view, with exact statistics of the batch of all ranks.

    With C the unbiased covariance matrix of a view over the batch (Bardes et al., ICLR 2022, equations 1-4; the scale
    of its public code; eps 1e-4):
        std = sum_j relu(1 - sqrt(C_jj + eps)) / D,   cov = sum_{i != j} C_ij^2 / D.
    Every rank gets the same values and must compute the same loss from them. Backward then needs no collective: the
    gradient of a rank's rows is that of the losses of all ranks (see `cjepa_fast.distributed`).

    Args:
        z: [N, V, D]: images of this rank (equally many on every rank), views, width; any strides.
        form: "covariance" computes Z^T Z [D, D] and sums over ranks; "gram" computes the dual Z Z^T [N, N of all ranks]
            from gathered rows (Garrido et al., ICLR 2023): the same function. "auto" takes the cheaper one.
        impl: see `cjepa_fast.ops`. The Triton kernels take fp32, bf16 and fp16 and are deterministic. For 16-bit input,
            centred values are rounded once to that type, and products accumulate in fp32. In fp16, a covariance beyond
            65504 overflows, as in plain torch.

    Returns (std, cov), each [V] fp32 (fp64 for fp64, which only the eager implementation takes).

    Raises UserError if the batch of all ranks has fewer than 2 images, or if impl is unknown or cannot run; ValueError
    if z is not [N, V, D] of floats with V, D >= 1, or for another form.
    """
    if z.ndim != 3 or 0 in z.shape[1:] or not z.is_floating_point():
        raise ValueError(f"z wants floats [N, V, D] with V, D >= 1, got {z.dtype} {tuple(z.shape)}")
    if form not in ("auto", "covariance", "gram"):
        raise ValueError(f"unknown form {form!r} of variance_covariance; known: auto, covariance, gram")
    ranks = world_size()
    count = z.shape[0] * ranks
    if count < 2:
        raise UserError(f"variance and covariance need a global batch of at least 2 images, got {count}")
    impl = choose("variance_covariance", impl, z.device.type, unsupported(z))
    if form == "auto":
        form = variance_covariance_form(z.shape[0], z.shape[2], ranks, z.element_size())
    if z.stride(2) != 1:
        z = z.contiguous()
    if impl == "eager":
        return _Eager.apply(z, count, form)  # pyright: ignore[reportReturnType]
    with_grad = z.requires_grad and torch.is_grad_enabled()
    std, cov = _variance_covariance(z, count, form, with_grad)[0].unbind()
    return std, cov


def variance_covariance_form(rows: int, width: int, ranks: int, element_size: int) -> str:
    """Return the cheaper of "covariance" and "gram" for `rows` of `width` on each of `ranks`.

    On one rank, the cost is a triangle forward and a full product backward. On several, gram computes a rectangle of
    its matrix, a ring all-reduce moves the fp32 triangle twice, and an all-gather moves the rows once.
    """
    count = rows * ranks
    covariance, gram = 3 * rows * width**2, (3 if ranks == 1 else 4) * rows * count * width
    if ranks > 1:
        covariance += _FLOP_PER_BYTE * 4 * width**2
        gram += _FLOP_PER_BYTE * element_size * count * width
    return "gram" if gram < covariance else "covariance"


class _Eager(torch.autograd.Function):
    """Plain torch with an explicit gradient: one product backward, where autograd needs two and keeps copies."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, count: int, form: str) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(z.dtype, torch.float32)
        length, _, width = z.shape
        gram, several = form == "gram", count > length
        rows = gather_rows(z) if gram and several else z
        # Subtract the mean of all ranks before squaring: products then add up over ranks without cancellation.
        mean = rows.mean(dim=0, dtype=precise)
        if several and not gram:
            dist.all_reduce(mean)
            mean *= length / count
        centred = (rows - mean).transpose(0, 1)
        if gram:
            variance = centred.square().sum(dim=1) / (count - 1)
            own = centred[:, length * dist.get_rank() :][:, :length] if several else centred
            matrix = torch.bmm(own, centred.transpose(1, 2))
            energy = _energy(matrix)
            if several:
                dist.all_reduce(energy)
            cov = energy / (width * (count - 1) ** 2) - variance.square().sum(dim=1) / width
        else:
            matrix = torch.bmm(centred.transpose(1, 2), centred)
            if several:
                dist.all_reduce(matrix)
            diagonal = matrix.diagonal(dim1=1, dim2=2)
            variance = diagonal / (count - 1)
            # Remove the diagonal before squaring: subtracting its energy afterwards would cancel.
            diagonal.zero_()
            cov = _energy(matrix) / (width * (count - 1) ** 2)
        deviation = (variance + STD_EPS).sqrt()
        ctx.count = count
        ctx.save_for_backward(z, rows if gram else None, matrix, mean, variance, deviation)
        return F.relu(STD_TARGET - deviation).mean(dim=1), cov

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        z, rows, matrix, mean, variance, deviation = ctx.saved_tensors
        length, _, width = z.shape
        # The loss of every rank depends on this rank's rows.
        scale = ctx.count / length / (width * (ctx.count - 1))
        for_std, for_cov = (grad[:, None] * scale for grad in upstream)
        for_product = for_cov * (4 / (ctx.count - 1))
        slope = torch.where(deviation < STD_TARGET, -for_std / deviation, 0)
        centred = z - mean
        # in place: the gradient has z's layout, without a copy
        if rows is None:
            grad = centred * slope
            views = grad.transpose(0, 1)
            torch.baddbmm(views, (centred * for_product).transpose(0, 1), matrix, out=views)
        else:
            grad = centred * (slope - 4 * for_cov * variance)
            views = grad.transpose(0, 1)
            factor = (centred if rows is z else rows - mean) * for_product
            torch.baddbmm(views, matrix, factor.transpose(0, 1), out=views)
        return grad.to(z.dtype), None, None


def _energy(matrix: Tensor) -> Tensor:
    """Return the sums of squares [V] of matrices [V, K, L], without a copy; by rows, as long sums lose digits."""
    return torch.linalg.vector_norm(matrix, dim=2).square().sum(dim=1)


@torch.library.custom_op("cjepa::variance_covariance", mutates_args=())
def _variance_covariance(
    z: Tensor, count: int, form: str, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the terms [2, V] (std, cov) and the tensors for backward, empty without `with_grad`.

    Those are matrix, mean and slopes (see `cjepa_fast.kernels.variance_covariance.fwd`) and, for the gram form on
    several ranks, z of all ranks [count, V, D].
    """
    from cjepa_fast.kernels import variance_covariance as kernel

    gather = form == "gram" and count > len(z)
    rows = gather_rows(z) if gather else z
    first = len(z) * dist.get_rank() if gather else 0
    found = kernel.fwd(rows, first, len(z), count, form == "gram", with_grad, STD_TARGET, STD_EPS, dist.all_reduce)
    return *found, rows if gather and with_grad else z.new_empty(0)


@_variance_covariance.register_fake
def _(z: Tensor, count: int, form: str, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    length, views, width = z.shape

    def kept(dtype: torch.dtype, *shape: int) -> Tensor:
        return z.new_empty(shape if with_grad else 0, dtype=dtype)

    gram = form == "gram"
    return (
        z.new_empty((2, views), dtype=torch.float32),
        kept(z.dtype, views, *((length, count) if gram else (width, width))),
        kept(torch.float32, views, width),
        kept(torch.float32, 1 + gram, views, width),
        kept(z.dtype, count, views, width) if gram and count > length else z.new_empty(0),
    )


@torch.library.custom_op("cjepa::variance_covariance_backward", mutates_args=())
def _variance_covariance_backward(
    upstream: Tensor, z: Tensor, matrix: Tensor, mean: Tensor, slopes: Tensor, gathered: Tensor, count: int
) -> Tensor:
    from cjepa_fast.kernels import variance_covariance as kernel

    several = gathered.numel() > 0
    first = len(z) * dist.get_rank() if several else 0
    gain = count / len(z)  # the loss of every rank depends on this rank's rows
    return kernel.bwd(upstream, gathered if several else z, first, len(z), count, gain, matrix, mean, slopes)


@_variance_covariance_backward.register_fake
def _(
    upstream: Tensor, z: Tensor, matrix: Tensor, mean: Tensor, slopes: Tensor, gathered: Tensor, count: int
) -> Tensor:
    return z.new_empty(z.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, ctx.count, _, with_grad = inputs
    ctx.mark_non_differentiable(*output[1:])
    if with_grad:
        ctx.save_for_backward(z, *output[1:])


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _variance_covariance_backward(upstream, *ctx.saved_tensors, ctx.count), None, None, None


_variance_covariance.register_autograd(_differentiate, setup_context=_save)


# Count the full products of plain torch, so that a step's FLOP do not depend on the implementation.
@register_flop_formula(torch.ops.cjepa.variance_covariance)
def _fwd_flop(z: tuple[int, ...], count: int, form: str, *rest: Any, **options: Any) -> int:
    length, views, width = z
    return 2 * views * length * width * (count if form == "gram" else width)


@register_flop_formula(torch.ops.cjepa.variance_covariance_backward)
def _bwd_flop(upstream: Any, z: tuple[int, ...], matrix: tuple[int, ...], *rest: Any, **options: Any) -> int:
    length, _, width = z
    return 2 * math.prod(matrix) * (length if matrix[1:] == (width, width) else width)
