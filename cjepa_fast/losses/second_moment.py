"""The losses of I-JEPA and C-JEPA, and the projector in front of C-JEPA's regularisation.

C-JEPA (Mo & Tong, NeurIPS 2024, arXiv 2410.19560), appendix C:
    L = L_JEPA + 0.001 (25 sim + 25 std + 1 cov).
Batch statistics are those of the global batch: with several processes they are summed over ranks, with exact gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cjepa_fast import ops
from cjepa_fast.distributed import sum_over_ranks, world_size
from cjepa_fast.errors import UserError


def prediction_loss(
    predictions: Tensor, targets: Tensor, target_indices: Tensor, kind: str = "smooth_l1", *,
    offsets: Tensor | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """I-JEPA's loss between predicted and actual embeddings of the target patches, a scalar fp32 (fp64 for fp64 input).

    Targets are layer-normed over D without affine (eps 1e-5) before they are gathered.

    Args:
        predictions: [B, M, K, D], any float dtype.
        targets: [B, N, D], the target encoder's output for all patches; constants, no gradient reaches them. Packed
            [T, D]: its output for the union of each image's target patches, image after image, then padding.
        target_indices: integer [B, M, K], row-major patch numbers in [0, N); packed, slots in the image's union.
        kind: "smooth_l1" (beta 1, mean over everything: what the published runs minimise) or "l2" (the paper's text,
            I-JEPA section 3: sum over patches and dimensions of a block, mean over blocks and images).
        offsets: int32 [B + 1], where each image's packed targets begin, and the end.
        impl: "auto", "triton" or "eager", see `cjepa_fast.ops`.

    Raises UserError for another kind, or an implementation that cannot run.
    """
    if kind not in ("smooth_l1", "l2"):
        raise UserError(f"unknown prediction loss {kind!r}; known: smooth_l1, l2")
    return ops.prediction_loss(predictions, targets, target_indices, kind, offsets=offsets, impl=impl)


def block_vicreg(z: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """C-JEPA's Algorithm 1: VICReg between the M target blocks of an image, all M (M - 1) ordered pairs, averaged.

    Computed without the loop over pairs. With C_i and v_i the covariance matrix and the variance hinge of block i
    over the batch, and zbar the mean over an image's blocks, the average over ordered pairs of VICReg's terms is
        sim = 2 / (M - 1) * sum_i mean((z_i - zbar)^2),   std = mean_i v_i,   cov = 2 mean_i |offdiag C_i|^2 / D,
    which takes M variances and M covariances instead of M (M - 1) gathers.

    Args:
        z: projected block means [B, M, D], fp32 or fp64; B images of this rank, M >= 2.
        impl: "auto", "triton" or "eager", see `cjepa_fast.ops`.

    Returns (sim, std, cov): unweighted scalars of the global batch, scaled as VICReg's public code scales them
    (unbiased variance, std averaged and cov summed over the two views of a pair).

    Raises UserError if M < 2, if the global batch holds fewer than 2 images, or for an implementation that cannot run.
    """
    _, blocks, _ = z.shape
    if blocks < 2:
        raise UserError(f"block_vicreg compares target blocks of an image: it needs at least 2, got {blocks}")
    std, cov = ops.variance_covariance(z, impl=impl)
    sim = _mean_square(z - z.mean(dim=1, keepdim=True), 2 * blocks / (blocks - 1))
    return sim, std.mean(), 2 * cov.mean()


def context_target_vicreg(context: Tensor, target: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """The reading of C-JEPA's appendix C.2 pseudo-code, which contradicts Algorithm 1: an option, not the default.

    Args:
        context, target: projected mean embeddings [B, D] of the context and of the whole image by the target encoder.
        impl: "auto", "triton" or "eager", see `cjepa_fast.ops`.

    Returns (sim, std, cov): mean squared distance of the two, and the variance and covariance terms of the context
    alone, neither halved nor doubled; statistics of the global batch. Raises as `block_vicreg`.
    """
    std, cov = ops.variance_covariance(context[:, None], impl=impl)
    return _mean_square(context - target), std[0], cov[0]


def _mean_square(x: Tensor, factor: float = 1.0) -> Tensor:
    """`factor` times the mean square of the elements of all ranks, which hold equally many."""
    return sum_over_ranks(x.square().sum(), same_downstream=True) * (factor / (x.numel() * world_size()))


class GlobalBatchNorm(nn.Module):
    """Batch norm of rows [n, D] over the global batch, always by batch statistics (the projector is never evaluated).

    torch's SyncBatchNorm has no CPU implementation; for one process this equals nn.BatchNorm1d in training mode.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if world_size() == 1:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        rows = x.shape[0] * world_size()
        mean = x.mean(dim=0)
        # centred products are accurate in fp32; raw moments, which add over ranks, cancel and take fp64
        mean64 = mean.double()
        raw = (x - mean).square().sum(dim=0).double() + x.shape[0] * mean64.square()
        total, raw = sum_over_ranks(torch.stack([x.shape[0] * mean64, raw])).unbind()
        mean64 = total / rows
        scale = self.weight * (raw / rows - mean64.square() + self.eps).rsqrt().to(x.dtype)
        return (x - mean64.to(x.dtype)) * scale + self.bias


class Projector(nn.Module):
    """Maps mean embeddings to the space of the VICReg terms: `layers` linear maps, batch norm and ReLU between them.

    The paper names a projector without its shape; the default (two layers, all of the encoder's width) is ours.
    Rows of all views are normalised together, over the global batch. No layer has a bias: batch norm, and after the
    last layer every VICReg term, is blind to one, and AdamW would blow up the rounding of its zero gradient.
    Input [..., D], output [..., hidden].
    """

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for index in range(layers):
            modules.append(nn.Linear(width if index == 0 else hidden, hidden, bias=False))
            if index < layers - 1:
                modules += [GlobalBatchNorm(hidden), nn.ReLU()]
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
