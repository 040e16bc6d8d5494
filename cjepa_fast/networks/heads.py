"""Networks on top of mean embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cjepa_fast.distributed import sum_over_ranks, world_size


class GlobalBatchNorm(nn.Module):
    """Batch norm of rows [n, D] over the batch of all ranks, in training and evaluation alike.

    For one process this is nn.BatchNorm1d in training mode. torch's SyncBatchNorm has no CPU implementation.
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
        # Centred squares are accurate in fp32. Raw moments, which add up over ranks, cancel, so they take fp64.
        mean64 = mean.double()
        raw = (x - mean).square().sum(dim=0).double() + x.shape[0] * mean64.square()
        total, raw = sum_over_ranks(torch.stack([x.shape[0] * mean64, raw])).unbind()
        mean64 = total / rows
        scale = self.weight * (raw / rows - mean64.square() + self.eps).rsqrt().to(x.dtype)
        return (x - mean64.to(x.dtype)) * scale + self.bias


class Projector(nn.Module):
    """Linear layers with batch norm and ReLU between them: [..., width] -> [..., widths[-1]].

    C-JEPA names a projector in front of its VICReg terms without giving its shape. Batch norm spans the rows of all
    views and ranks. No layer has a bias: batch norm and the VICReg terms ignore a constant, so its gradient would be
    rounding noise, which AdamW would amplify.

    Args:
        width: number of inputs.
        widths: number of outputs of each linear layer.
    """

    def __init__(self, width: int, widths: Sequence[int]) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for out in widths:
            if modules:
                modules += [GlobalBatchNorm(width), nn.ReLU()]
            modules.append(nn.Linear(width, out, bias=False))
            width = out
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
