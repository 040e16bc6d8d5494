"""I-JEPA's prediction loss: target layer norm, gather, distance and its derivative in one pass over memory.

    y_r = (t_r - mean t_r) / sqrt(var t_r + 1e-5),  t_r = targets[start of r's image + indices[r]],  d_r = p_r - y_r
    smooth L1:  loss = mean_rj h(d_rj),         h(d) = d^2 / 2 if |d| < 1 else |d| - 1/2,
                dloss/dp = clamp(d, -1, 1) / (B M K D)
    L2:         loss = sum_rj d_rj^2 / (B M),   dloss/dp = 2 d / (B M)

Bytes for P = size of the predictions and T = size of the distinct target tokens: forward 2 P + T (P + T without
gradient), backward 2 P. The normalised targets stay on chip. The forward pass stores the residual, clamp(d) or d,
instead of the gradient, as 1 / (B M K D) is below fp16's smallest number. Backward applies the factor and the upstream
gradient in fp32.

Sources: Assran et al., CVPR 2023 (arXiv 2301.08243), section 3; derivative in the forward pass as in Hsu et al., 2024
(Liger kernel, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 4096  # a whole row is held in registers


@triton.jit
def _normalise(x, mask, D: tl.constexpr):
    """Layer-norm rows x [R, BD] without affine; columns outside `mask` are 0 before and after."""
    centred = tl.where(mask, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    return centred * tl.rsqrt(variance + 1e-5)[:, None]


# Not specialised: sizes that change with the masks would compile new variants.
@triton.jit(do_not_specialize=["rows", "rows_per_image", "patches", "target_rows"])
def _fwd_kernel(
    predictions,  # [rows, D]
    targets,  # [target_rows, D]
    indices,  # [rows] integer
    offsets,  # [images + 1] int32: the images' rows of `targets`, or None: `patches` rows each
    partials,  # [programs] fp32: the programs' shares of the loss
    residuals,  # [rows, D] in the predictions' dtype, or None
    scale,  # fp32: 1 / (B M K D) or 1 / (B M)
    rows,
    rows_per_image,
    patches,
    target_rows,
    D: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the loss and the residuals of BLOCK_R whole rows of the predictions."""
    i_p = tl.program_id(0).to(tl.int64)
    o_r = i_p * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    o_d = tl.arange(0, BLOCK_D)[None, :]  # [1, BD]
    m_r = o_r < rows
    b_index = tl.load(indices + o_r, mask=m_r, other=0).to(tl.int64)
    b_image = o_r // rows_per_image
    if offsets is None:
        b_start = b_image * patches
        b_count = patches
    else:
        b_start = tl.load(offsets + b_image, mask=m_r, other=0).to(tl.int64)
        b_count = tl.load(offsets + b_image + 1, mask=m_r, other=0) - b_start
    o_t = b_start + b_index
    m_known = (b_index >= 0) & (b_index < b_count) & (o_t >= 0) & (o_t < target_rows)  # whatever the offsets hold
    m_known = (m_known | (o_r >= rows))[:, None]
    m_d = o_d < D
    mask = m_r[:, None] & m_d

    b_p = tl.load(predictions + o_r[:, None] * D + o_d, mask=mask, other=0.0).to(tl.float32)  # [R, BD]
    b_t = tl.load(targets + o_t[:, None] * D + o_d, mask=mask & m_known, other=0.0).to(tl.float32)
    # An index outside the image gives NaN.
    b_d = b_p - tl.where(m_known, _normalise(b_t, m_d, D), float("nan"))

    if SMOOTH:
        b_abs = tl.abs(b_d)
        b_loss = tl.where(b_abs < 1.0, 0.5 * b_d * b_d, b_abs - 0.5)
        b_d = tl.where(b_d > 1.0, 1.0, tl.where(b_d < -1.0, -1.0, b_d))  # keeps NaN, which tl.clamp does not
    else:
        b_loss = b_d * b_d
    tl.store(partials + i_p, tl.sum(b_loss) * scale)
    if residuals is not None:
        tl.store(residuals + o_r[:, None] * D + o_d, b_d.to(residuals.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    upstream,  # [] fp32
    residuals,  # [count]
    grads,  # [count] in the residuals' dtype
    scale,  # fp32: 1 / (B M K D) or 2 / (B M)
    count,
    BLOCK: tl.constexpr,
):
    """Compute BLOCK elements: grad = upstream * scale * residual."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < count
    b_grad = tl.load(residuals + o_n, mask=mask).to(tl.float32) * (tl.load(upstream) * scale)
    tl.store(grads + o_n, b_grad.to(grads.dtype.element_ty), mask=mask)


def fwd(
    predictions: Tensor, targets: Tensor, indices: Tensor, offsets: Tensor | None, kind: str, with_residual: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the loss [] fp32 and the residual [B, M, K, D], empty without `with_residual`; arguments are contiguous.

    Targets are [B, N, D], or with offsets [B + 1] packed [T, D].
    """
    batch, blocks, length, width = predictions.shape
    assert targets.shape[-1] == width <= MAX_WIDTH
    assert targets.shape[0] == batch if offsets is None else offsets.shape == (batch + 1,)
    assert indices.shape == (batch, blocks, length)
    assert all(x is None or x.is_contiguous() for x in (predictions, targets, indices, offsets))
    residual = torch.empty_like(predictions) if with_residual else predictions.new_empty(0)
    divisor = _divisor(predictions, kind)
    if predictions.numel() == 0:  # the mean of nothing is NaN, as in torch
        return torch.zeros((), device=predictions.device) / divisor, residual

    rows = batch * blocks * length
    tile = {"D": width, "SMOOTH": kind == "smooth_l1", **_fwd_tile(width)}
    programs = -(-rows // tile["BLOCK_R"])
    partials = torch.empty(programs, dtype=torch.float32, device=predictions.device)
    with torch.cuda.device_of(predictions):
        _fwd_kernel[(programs,)](
            predictions, targets, indices, offsets, partials, residual if with_residual else None, 1 / divisor,
            rows, blocks * length, targets.shape[-2], targets.shape[:-1].numel(), **tile,
        )  # fmt: skip
    return partials.sum(), residual


def bwd(upstream: Tensor, residual: Tensor, kind: str) -> Tensor:
    """Return the gradient [B, M, K, D] from the upstream gradient [] fp32 and the residual that `fwd` stored."""
    grad = torch.empty_like(residual)
    if residual.numel() == 0:
        return grad
    scale = (1 if kind == "smooth_l1" else 2) / _divisor(residual, kind)
    with torch.cuda.device_of(residual):
        _bwd_kernel[(-(-residual.numel() // BWD_TILE["BLOCK"]),)](
            upstream, residual, grad, scale, residual.numel(), **BWD_TILE
        )
    return grad


def _divisor(predictions: Tensor, kind: str) -> int:
    """Return the divisor of the sum over elements: B M K D for smooth L1, B M for L2."""
    return predictions.numel() if kind == "smooth_l1" else predictions.shape[0] * predictions.shape[1]


def _fwd_tile(width: int) -> dict[str, Any]:
    """Return the tile: whole rows in registers, 16 elements per thread. By construction; not yet tuned on a GPU."""
    block = 1 << (width - 1).bit_length()
    return {"BLOCK_R": max(1, 2048 // block), "BLOCK_D": block, "num_warps": 4 if block <= 2048 else 8}


BWD_TILE: dict[str, Any] = {"BLOCK": 2048, "num_warps": 4}


def _aot() -> list[dict[str, Any]]:
    """List the shipped tiles for ahead-of-time compilation; ":16" marks multiples of 16."""
    tiles: list[dict[str, Any]] = []
    for dtype, index, width, kind, residual, packed in [
        *(("bf16", "i16", width, "smooth_l1", True, False) for width in (96, 192, 384, 768, 1024, 1280, 1408)),
        ("bf16", "i64", 1408, "smooth_l1", False, False),
        ("bf16", "i16", 1408, "l2", True, False),
        ("fp16", "i32", 1408, "smooth_l1", True, False),
        ("fp32", "i64", 1408, "smooth_l1", True, False),
        ("fp32", "i64", MAX_WIDTH, "l2", True, False),
        *(("bf16", "i16", width, "smooth_l1", True, True) for width in (384, 1408)),
        ("fp32", "i16", MAX_WIDTH, "l2", True, True),
    ]:
        pointer = f"*{dtype}:16"
        signature: dict[str, str] = {
            "predictions": pointer, "targets": pointer, "indices": f"*{index}:16", "partials": "*fp32:16",
            "scale": "fp32", **dict.fromkeys(("rows", "rows_per_image", "patches", "target_rows"), "i32"),
        }  # fmt: skip
        constants: dict[str, Any] = {"D": width, "SMOOTH": kind == "smooth_l1", **_fwd_tile(width)}
        if residual:
            signature["residuals"] = pointer
        else:
            constants["residuals"] = None
        if packed:
            signature["offsets"] = "*i32:16"
        else:
            constants["offsets"] = None
        name = f"fwd {kind} {dtype} {index} D={width}{' packed' * packed}" + ("" if residual else ", no grad")
        tiles.append(dict(name=name, kernel=_fwd_kernel, signature=signature, constants=constants))
    for dtype in ("bf16", "fp16", "fp32"):
        pointer = f"*{dtype}:16"
        signature = {
            "upstream": "*fp32:16", "residuals": pointer, "grads": pointer, "scale": "fp32", "count": "i32:16"
        }  # fmt: skip
        tiles.append(dict(name=f"bwd {dtype}", kernel=_bwd_kernel, signature=signature, constants=BWD_TILE))
    return tiles


AOT = _aot()
