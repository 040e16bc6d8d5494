"""I-JEPA's prediction loss: the targets' layer norm, gather and distance in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cjepa_fast.ops._checks import contiguous, unsupported
from cjepa_fast.ops._choice import choose


def prediction_loss(
    predictions: Tensor, targets: Tensor, target_indices: Tensor, kind: str = "smooth_l1", *,
    offsets: Tensor | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Compute I-JEPA's loss between predicted and layer-normed embeddings: see `cjepa_fast.losses.prediction_loss`.

    For an index outside the image's targets, the eager implementation raises, and the Triton one returns NaN.

    Args:
        predictions: [B, M, K, D], any strides.
        targets: [B, N, D]; packed [T, D].
        target_indices: integer [B, M, K], rows of the image's targets.
        kind: "smooth_l1" or "l2".
        offsets: int32 [B + 1], packed mode: image b has targets[offsets[b] : offsets[b + 1]], with offsets[0] = 0, and
            target_indices count from offsets[b]. Padding follows from offsets[B] on. (A mask sampler gives them as
            `union_offsets` and `target_slot`.)
        impl: see `cjepa_fast.ops`. The Triton kernel takes fp32, bf16 and fp16, D <= 4096, and is deterministic.

    Returns a scalar fp32 (fp64 if the predictions are fp64, which only the eager implementation takes).

    Raises UserError if impl is unknown or cannot run, ValueError if shapes do not match.
    """
    assert kind in ("smooth_l1", "l2"), kind
    batch, blocks, length, width = predictions.shape
    rows = (batch, *targets.shape[1:2]) if offsets is None else targets.shape[:1]
    if targets.shape != (*rows, width) or target_indices.shape != (batch, blocks, length):
        wanted = f"[{batch}, N, {width}]" if offsets is None else f"[T, {width}] with offsets"
        raise ValueError(
            f"predictions {tuple(predictions.shape)} want targets {wanted} and indices "
            f"{(batch, blocks, length)}, got {tuple(targets.shape)} and {tuple(target_indices.shape)}"
        )
    if offsets is not None and (offsets.shape != (batch + 1,) or offsets.dtype != torch.int32):
        raise ValueError(f"offsets are {offsets.dtype} {tuple(offsets.shape)}, want torch.int32 ({batch + 1},)")
    why = unsupported(predictions, targets) or ("tokens are wider than 4096" if width > 4096 else None)
    if choose("prediction_loss", impl, predictions.device.type, why) == "eager":
        return _prediction_loss_eager(predictions, targets, target_indices, offsets, kind)
    with_residual = predictions.requires_grad and torch.is_grad_enabled()
    loss, _ = _prediction_loss(
        predictions.contiguous(), targets.detach().contiguous(), target_indices.contiguous(),
        contiguous(offsets), kind, with_residual,
    )  # fmt: skip
    return loss


def _prediction_loss_eager(
    predictions: Tensor, targets: Tensor, target_indices: Tensor, offsets: Tensor | None, kind: str
) -> Tensor:  # fmt: skip
    precise = torch.promote_types(predictions.dtype, torch.float32)
    normed = F.layer_norm(targets.detach().to(precise), targets.shape[-1:]).flatten(0, -2)
    if offsets is None:
        counts = targets.shape[1]
        starts = counts * torch.arange(targets.shape[0], device=targets.device)[:, None, None]
    else:
        starts, counts = (x[:, None, None] for x in (offsets[:-1], offsets.diff()))
    # A wrong index points behind the last target, where an embedding, unlike indexing, raises.
    known = (target_indices >= 0) & (target_indices < counts)
    chosen = F.embedding(torch.where(known, starts + target_indices.long(), normed.shape[0]), normed)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(predictions.to(precise), chosen)
    blocks = predictions.shape[0] * predictions.shape[1]
    return F.mse_loss(predictions.to(precise), chosen, reduction="sum") / blocks


@torch.library.custom_op("cjepa::prediction_loss", mutates_args=())
def _prediction_loss(
    predictions: Tensor, targets: Tensor, target_indices: Tensor, offsets: Tensor | None, kind: str, with_residual: bool
) -> tuple[Tensor, Tensor]:
    from cjepa_fast.kernels import prediction_loss as kernel

    return kernel.fwd(predictions, targets, target_indices, offsets, kind, with_residual)


@_prediction_loss.register_fake
def _(
    predictions: Tensor, targets: Tensor, target_indices: Tensor, offsets: Tensor | None, kind: str, with_residual: bool
) -> tuple[Tensor, Tensor]:
    residual = torch.empty_like(predictions) if with_residual else predictions.new_empty(0)
    return predictions.new_empty((), dtype=torch.float32), residual


@torch.library.custom_op("cjepa::prediction_loss_backward", mutates_args=())
def _prediction_loss_backward(upstream: Tensor, residual: Tensor, kind: str) -> Tensor:
    from cjepa_fast.kernels import prediction_loss as kernel

    return kernel.bwd(upstream, residual, kind)


@_prediction_loss_backward.register_fake
def _(upstream: Tensor, residual: Tensor, kind: str) -> Tensor:
    return torch.empty_like(residual)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, ctx.kind, with_residual = inputs
    ctx.mark_non_differentiable(output[1])
    if with_residual:
        ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (residual,) = ctx.saved_tensors
    return _prediction_loss_backward(upstream, residual, ctx.kind), None, None, None, None, None


_prediction_loss.register_autograd(_differentiate, setup_context=_save)


# torch counts matrix products only. Zero makes the count of both implementations equal.
@register_flop_formula([torch.ops.cjepa.prediction_loss, torch.ops.cjepa.prediction_loss_backward])
def _no_products(*args: Any, **kwargs: Any) -> int:
    return 0
