"""The one door to the fused kernels and the C++ library: each operation's public face and its implementation.

Every fused operation takes impl = "auto", "triton" or "eager". "auto" takes the Triton kernel for CUDA tensors if
Triton is installed and the kernel supports the arguments, else plain torch; asking for "triton" where it cannot run is
an error. The choice and its reason are logged once. Both implementations compute the same function and gradients.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cjepa_fast import native, reference_masks
from cjepa_fast.errors import UserError
from cjepa_fast.reference_masks import MaskSpec

log = logging.getLogger("cjepa_fast")


def require(impl: str, device_type: str) -> None:
    """Raises UserError if `impl` cannot run on tensors of this device type: to ask before a run."""
    if impl == "triton" and (obstacle := _triton_obstacle(device_type)):
        raise UserError(f"runtime.kernels: triton cannot run: {obstacle}; use eager or auto")


def prediction_loss(
    predictions: Tensor, targets: Tensor, target_indices: Tensor, kind: str = "smooth_l1", *, impl: str = "auto"
) -> Tensor:  # fmt: skip
    """I-JEPA's loss between predicted and layer-normed actual embeddings: see `cjepa_fast.losses.prediction_loss`.

    The targets are constants: no gradient reaches them. An index outside [0, N) is an error of the eager
    implementation and makes the loss NaN in the Triton one.

    Args:
        predictions: [B, M, K, D], any strides.
        targets: [B, N, D].
        target_indices: integer [B, M, K].
        kind: "smooth_l1" or "l2".
        impl: see above. The Triton kernel takes fp32, bf16 and fp16, D <= 4096, and is deterministic.

    Returns a scalar fp32 (fp64 if the predictions are fp64, which only the eager implementation takes).

    Raises UserError if impl is unknown or cannot run, ValueError if shapes do not match.
    """
    assert kind in ("smooth_l1", "l2"), kind
    batch, blocks, length, width = predictions.shape
    matching = targets.ndim == 3 and targets.shape[::2] == (batch, width)
    if not matching or target_indices.shape != (batch, blocks, length):
        raise ValueError(
            f"predictions {tuple(predictions.shape)} want targets [{batch}, N, {width}] and indices "
            f"{(batch, blocks, length)}, got {tuple(targets.shape)} and {tuple(target_indices.shape)}"
        )
    unsupported = None
    if not {predictions.dtype, targets.dtype} <= {torch.float32, torch.bfloat16, torch.float16}:
        unsupported = f"dtypes {predictions.dtype}, {targets.dtype} are not fp32, bf16 or fp16"
    elif width > 4096:
        unsupported = "rows are wider than 4096"
    if _choose("prediction_loss", impl, predictions.device.type, unsupported) == "eager":
        return _prediction_loss_eager(predictions, targets, target_indices, kind)
    with_residual = predictions.requires_grad and torch.is_grad_enabled()
    loss, _ = _prediction_loss(
        predictions.contiguous(), targets.detach().contiguous(), target_indices.contiguous(), kind, with_residual
    )  # fmt: skip
    return loss


def _prediction_loss_eager(predictions: Tensor, targets: Tensor, target_indices: Tensor, kind: str) -> Tensor:
    precise = torch.promote_types(predictions.dtype, torch.float32)
    normed = F.layer_norm(targets.detach().to(precise), targets.shape[-1:])
    images = torch.arange(targets.shape[0], device=targets.device)[:, None, None]
    chosen = normed[images, target_indices.long()]
    if kind == "smooth_l1":
        return F.smooth_l1_loss(predictions.to(precise), chosen)
    blocks = predictions.shape[0] * predictions.shape[1]
    return F.mse_loss(predictions.to(precise), chosen, reduction="sum") / blocks


@torch.library.custom_op("cjepa::prediction_loss", mutates_args=())
def _prediction_loss(
    predictions: Tensor, targets: Tensor, target_indices: Tensor, kind: str, with_residual: bool
) -> tuple[Tensor, Tensor]:
    from cjepa_fast.kernels import prediction_loss as kernel

    return kernel.fwd(predictions, targets, target_indices, kind, with_residual)


@_prediction_loss.register_fake
def _(
    predictions: Tensor, targets: Tensor, target_indices: Tensor, kind: str, with_residual: bool
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
    return _prediction_loss_backward(upstream, residual, ctx.kind), None, None, None, None


_prediction_loss.register_autograd(_differentiate, setup_context=_save)


# torch counts matrix products only; saying so makes both implementations count the same
@register_flop_formula([torch.ops.cjepa.prediction_loss, torch.ops.cjepa.prediction_loss_backward])
def _no_products(*args: Any, **kwargs: Any) -> int:
    return 0


def _choose(op: str, impl: str, device: str, unsupported: str | None) -> str:
    """Which of "triton" and "eager" runs `op`; `unsupported` says why the kernel cannot take the arguments."""
    if impl not in ("auto", "triton", "eager"):
        raise UserError(f"unknown impl {impl!r} for {op}; known: auto, triton, eager")
    obstacle = unsupported or _triton_obstacle(device)
    if impl == "triton" and obstacle:
        raise UserError(f"impl='triton' cannot run {op}: {obstacle}; take impl='eager' or 'auto'")
    where = f"the tensors are on {device}"
    if impl != "auto":
        choice, reason = impl, "asked for"
    elif device != "cuda" or not obstacle:
        choice, reason = "triton" if device == "cuda" else "eager", where
    else:
        choice, reason = "eager", obstacle
    _announce(op, choice, reason)
    return choice


# What torch.compiler.assume_constant_result does, without the second it takes to import dynamo: a compiled step runs
# the choice, its imports and its log line once, while it is traced.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton_obstacle(device: str) -> str | None:
    """Why Triton kernels cannot run on tensors of this device type; None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"the tensors are on {device}, not cuda" + (" (or set TRITON_INTERPRET=1)" if device == "cpu" else "")


@functools.cache
def _announce(op: str, choice: str, reason: str) -> None:
    log.info("%s: %s (%s)", op, choice, reason)


_IMAGES_PER_THREAD, _MAX_THREADS = 1024, 8  # below a thousand images a thread costs more than it samples


def mask_sampler(impl: str) -> str:
    """Which of "native" (C++) and "numpy" is to serve `sample_masks`, for impl = "auto", "native" or "numpy".

    "auto" falls back to NumPy with a warning that says why. Raises UserError for "native" where it cannot be had.
    """
    if impl not in ("auto", "native", "numpy"):
        raise UserError(f"impl={impl!r} is not known: use 'auto', 'native' or 'numpy'")
    if impl == "numpy":
        return impl
    reason = native.why_unavailable()
    if reason is None:
        return "native"
    if impl == "native":
        raise UserError(f"impl='native' cannot be had ({reason}): install a C++ compiler or use impl='numpy'")
    warnings.warn(
        f"masks are sampled by NumPy, about 20 times slower than the C++ core: {reason}", RuntimeWarning, stacklevel=4
    )
    return "numpy"


def sample_masks(spec: MaskSpec, ids: np.ndarray, *, impl: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of the samples `ids` [B] int64: see `cjepa_fast.reference_masks.sample`; `impl` is "native" or "numpy"."""
    if impl == "numpy":
        return reference_masks.sample(spec, ids)
    return native.sample_masks(spec, ids, max(1, min(len(ids) // _IMAGES_PER_THREAD, _MAX_THREADS)))
