"""How tokens form sequences, and which tokens a block computes.

Shapes: B images, S sequences, K tokens of a sequence, T tokens of a packed batch, M target blocks of Kt patches, Kc
context patches, N patches of an image, D or d or W width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cjepa_fast import ops


class Layout(NamedTuple):
    """The arrangement of tokens in sequences: [S, K, D] of one length, or packed [T, D], one sequence after another.

    offsets: int32 [S + 1], packed: the start of each sequence, and the end of the last. Padding follows.
    max_length: packed: an upper bound of the sequences' lengths.
    target_blocks: (M, Kt) if a sequence is [context | block 1 | ... | block M]. The context then sees itself, a block
        sees the context and itself.
    """

    offsets: Tensor | None = None
    max_length: int | None = None
    target_blocks: tuple[int, int] | None = None


FIXED = Layout()


class Selection(NamedTuple):
    """The tokens whose output is wanted; all other tokens serve as keys and values only.

    Either `count` tokens from `first` on in every sequence of one length, or the flattened tokens `index`.

    first, count: `count` is given, as a compiler of dynamic shapes cannot divide by a difference.
    index: integer [S, Kq], or [Tq] with a packed `layout` of its own.
    """

    first: int = 0
    count: int = 0
    index: Tensor | None = None
    layout: Layout = FIXED

    def of(self, x: Tensor) -> Tensor:
        """Select tokens: [S, K, W] or [T, W] -> [S, Kq, W] or [Tq, W]."""
        if self.index is None:
            return x.narrow(1, self.first, self.count)
        return x.flatten(0, -2).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)


class Origin(NamedTuple):
    """The unique tokens entering the predictor: project once, then gather into sequences.

    Every sequence of an image repeats its context tokens, and a mask token depends on its position alone. Norm and
    linear layers act on each token alone, so they may precede the gather.
    """

    context: Tensor  # [B, Kc, d] or packed [T, d]
    masks: Tensor  # [N, d], the mask token at each position
    target_indices: Tensor  # integer [B, M, Kt]
    offsets: Tensor | None  # int32 [B + 1] of packed contexts
    total: int  # tokens of a sequence, or of all packed sequences
    kernels: str  # the implementation of `cjepa_fast.ops.predictor_rows`

    def tokens(self) -> Tensor:
        """Return every unique token once, [R, d]."""
        return torch.cat([self.context.flatten(0, -2), self.masks])

    def gather(self, values: Tensor) -> Tensor:
        """Gather what was computed for `tokens`, [R, W], into sequences [B M, Kc + Kt, W] or packed [total, W]."""
        context, masks = values.split([len(values) - len(self.masks), len(self.masks)])
        context = context.view(*self.context.shape[:-1], -1)
        tokens = ops.predictor_rows(
            context, masks, self.target_indices, offsets=self.offsets, total=self.total, impl=self.kernels
        )
        return tokens if self.offsets is not None else tokens.flatten(0, 1)


def take_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Take rows of each image: x [B, N, C], integer indices [B, K] -> [B, K, C]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], indices.long()]
