"""Variance and covariance terms of V views of N rows of width D.

The method's product is Zc^T Zc (D x D, "covariance") or Zc Zc^T (N x N, "gram"), whichever is the smaller.
    forward    2 V N D min(N, D) FLOP, though the product is symmetric and half would do: a library's product is full;
               read Z
    backward   as many FLOP again; read Z and the product's matrix, write the gradient of Z
The yardstick is the products alone, in bf16 on a GPU, by the library: one forward, two forward and backward. What the
operation takes beyond it is the price of everything else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.cases import UNINTERPRETED, Case, Variant, both_directions, compiled
from bench.timing import Inputs
from cjepa_fast import ops

# N, V, D: the paper's batch with projectors of the encoders' widths and of VICReg's; then few rows, many rows
SHAPES = [(2048, 4, 1280), (2048, 4, 8192), (512, 4, 8192), (2048, 4, 1024), (2048, 4, 768), (2048, 4, 384),
          (8192, 4, 1024), (8192, 1, 8192), (2048, 1, 1024), (512, 4, 384)]  # fmt: skip
QUICK_SHAPES = [(128, 4, 96), (64, 4, 192), (128, 1, 96)]


def terms(z: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    std, cov = ops.variance_covariance(z, impl=impl)
    return std, cov


def published_style(z: Tensor) -> tuple[Tensor, Tensor]:
    """View by view, as VICReg's public code has it: a centred copy, its product, a copy of what is off the diagonal."""
    std, cov = [], []
    rows, _, width = z.shape
    for view in z.unbind(1):
        centred = view - view.mean(dim=0)
        std.append(F.relu(1 - (centred.var(dim=0) + 1e-4).sqrt()).mean())
        covariance = (centred.T @ centred) / (rows - 1)
        # one row longer, the diagonal becomes a column
        off_diagonal = covariance.flatten()[:-1].view(width - 1, width + 1)[:, 1:].flatten()
        cov.append(off_diagonal.pow(2).sum() / width)
    return torch.stack(std), torch.stack(cov)


def product(z: Tensor, gram: bool, dtype: torch.dtype) -> Tensor:
    z = z.detach().to(dtype).transpose(0, 1)  # [V, N, D]
    return z @ z.mT if gram else z.mT @ z


def two_products(z: Tensor, gram: bool, dtype: torch.dtype) -> Tensor:
    matrix, z = product(z, gram, dtype), z.detach().to(dtype).transpose(0, 1)
    return matrix @ z if gram else z @ matrix


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for rows, views, width in QUICK_SHAPES if quick else SHAPES:
        gram = rows < width
        eager = functools.partial(terms, impl="eager")
        how = {"gram": gram, "dtype": torch.bfloat16 if device == "cuda" else dtype}
        yardsticks = (functools.partial(product, **how), functools.partial(two_products, **how))

        def inputs(rows: int = rows, views: int = views, width: int = width) -> Inputs:
            return ((0.5 * torch.randn(rows, views, width, device=device)).to(dtype).requires_grad_(),)

        variants = [
            Variant(
                name="triton", call=functools.partial(terms, impl="triton"), role="ours",
                obstacle=None if device == "cuda" else UNINTERPRETED,
            ),
            Variant(name="eager", call=eager),
            Variant(name="published style", call=published_style),
            compiled(published_style),
        ]  # fmt: skip
        flop = 2 * views * rows * width * min(rows, width)
        size = rows * views * width * dtype.itemsize
        matrix = views * min(rows, width) ** 2 * dtype.itemsize
        name = f"N={rows} V={views} D={width} {'gram' if gram else 'covariance'}"
        yield from both_directions(
            name, variants, inputs, eager, (size, flop), (2 * size + matrix, flop), yardsticks
        )  # fmt: skip
