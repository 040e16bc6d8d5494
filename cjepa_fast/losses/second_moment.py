"""VICReg's terms (Bardes et al., ICLR 2022, arXiv 2105.04906) on two views, and on the target blocks of C-JEPA.

C-JEPA (Mo & Tong, NeurIPS 2024, arXiv 2410.19560), appendix C:  L = L_JEPA + 0.001 (25 sim + 25 std + 1 cov).

Every function returns (sim, std, cov): unweighted scalars, scaled as in VICReg's public code (unbiased variance; std
is the mean and cov the sum over the two views of a pair). Statistics are those of the batch of all ranks, with exact
gradients. `impl` is that of `cjepa_fast.ops`. Each raises UserError if the batch of all ranks has fewer than 2 images,
or if `impl` cannot run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_fast import ops
from cjepa_fast.distributed import sum_over_ranks, world_size
from cjepa_fast.errors import UserError


def vicreg(x: Tensor, y: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Compute VICReg's terms of two views of each image, projected embeddings [B, D] fp32 or fp64."""
    return block_vicreg(torch.stack([x, y], dim=1), impl=impl)


def block_vicreg(z: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Compute C-JEPA's Algorithm 1: VICReg's terms averaged over all M (M - 1) ordered pairs of an image's blocks.

    With C_i and v_i the covariance matrix and the variance hinge of block i over the batch, and zbar the mean over an
    image's blocks, the averages are
        sim = 2 / (M - 1) * sum_i mean((z_i - zbar)^2),   std = mean_i v_i,   cov = 2 mean_i |offdiag C_i|^2 / D,
    so M variances and covariances are enough.

    Args:
        z: projected block means [B, M, D], fp32 or fp64.

    Raises UserError also if M < 2.
    """
    _, blocks, _ = z.shape
    if blocks < 2:
        raise UserError(f"block_vicreg compares target blocks of an image: it needs at least 2, got {blocks}")
    std, cov = ops.variance_covariance(z, impl=impl)
    sim = _mean_square(z - z.mean(dim=1, keepdim=True), 2 * blocks / (blocks - 1))
    return sim, std.mean(), 2 * cov.mean()


def context_target_vicreg(context: Tensor, target: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Compute the terms of C-JEPA's pseudo-code (appendix C.2), which contradicts its Algorithm 1.

    sim is the mean squared distance of the two; std and cov are those of the context alone.

    Args:
        context, target: projected mean embeddings [B, D] of the context, and of the image by the target encoder.
    """
    std, cov = ops.variance_covariance(context[:, None], impl=impl)
    return _mean_square(context - target), std[0], cov[0]


def _mean_square(x: Tensor, factor: float = 1.0) -> Tensor:
    """Compute `factor` times the mean square over the elements of all ranks, which hold equally many."""
    return sum_over_ranks(x.square().sum(), same_downstream=True) * (factor / (x.numel() * world_size()))
