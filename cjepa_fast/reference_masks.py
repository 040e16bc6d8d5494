"""The plain NumPy truth of the multi-block mask sampler; `csrc/mask_sampler.cpp` gives the same bits.

Every random number is a word of Philox4x32-10 (Salmon et al., SC 2011), read at an address instead of drawn
from a state, so a mask depends on (seed, step, sample id) and on nothing else:

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (id low 32 bits, id high 32 bits, step, stream << 28 | attempt << 8 | block)

    stream 0  sizes     id 0, block 0: words for target scale, target aspect, context scale, context aspect
    stream 1  targets   block m // 2: words 2 (m % 2) and 2 (m % 2) + 1 are the row and column of target m
    stream 2  context   block 0: words 0 and 1 are the row and column of the window
    stream 3  subset    low 28 bits i // 4: word i % 4 is the i-th draw of the subset (fixed mode)

A word u becomes an integer in [0, n) as (u * n) >> 32. Nothing after the block sizes is floating point.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cjepa_fast.philox import philox4x32

SIZES, TARGETS, CONTEXT, SUBSET = range(4)
TRIES_PER_REGION = 20  # faithful: failures before one more target may overlap the context
MAX_ATTEMPTS = 64  # fixed: each fails for about 1 image in 128, at worst (a large min_keep) for 1 in 2


class MaskSpec(NamedTuple):
    """All that the masks of one step depend on, apart from the sample ids."""

    seed: int
    step: int
    faithful: bool
    height: int
    width: int
    num_targets: int
    target_h: int
    target_w: int
    context_h: int
    context_w: int
    min_keep: int  # faithful: a context needs more patches than this
    keep: int  # fixed: context patches kept of every image; 0 to measure the raw counts


def _words(spec: MaskSpec, ids: np.ndarray, stream: int, address: int) -> np.ndarray:
    """The four words at one address for every sample: [B, 4]."""
    counter = np.empty((len(ids), 4), np.uint32)
    counter[:, 0] = ids & 0xFFFFFFFF
    counter[:, 1] = ids >> 32
    counter[:, 2:] = spec.step, stream << 28 | address
    return philox4x32(counter, (spec.seed & 0xFFFFFFFF, spec.seed >> 32))


def _below(words: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    return words.astype(np.int64) * n >> 32


def _corner(spec: MaskSpec, words: np.ndarray, h: int, w: int) -> np.ndarray:
    """Top-left corner [B, 2] of an h x w block from its row and column words [B, 2]."""
    # The reference passes H - h to an exclusive randint, so its blocks never touch the last row or column.
    room = 0 if spec.faithful else 1
    rows = _below(words[:, 0], spec.height - h + room)
    return np.stack((rows, _below(words[:, 1], spec.width - w + room)), axis=-1)


def _inside(spec: MaskSpec, corner: np.ndarray, h: int, w: int) -> np.ndarray:
    """Which patches lie in the block at `corner` [B, 2]: [B, H, W] bool."""
    row, col = np.arange(spec.height) - corner[:, :1], np.arange(spec.width) - corner[:, 1:]
    return ((row >= 0) & (row < h))[:, :, None] & ((col >= 0) & (col < w))[:, None, :]


def _random_subset(spec: MaskSpec, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A random `keep`-subset of range(counts[b]) for each sample, by Floyd's algorithm: [B, H W] bool."""
    picked = np.zeros((len(ids), spec.height * spec.width), bool)
    image = np.arange(len(ids))
    words = np.empty((len(ids), 4), np.uint32)
    for i in range(spec.keep):
        if i % 4 == 0:
            words = _words(spec, ids, SUBSET, i // 4)
        last = counts - spec.keep + i
        pick = _below(words[:, i % 4], last + 1)
        picked[image, np.where(picked[image, pick], last, pick)] = True
    return picked


def sample(spec: MaskSpec, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of one step for `ids` [B] int64: context [B, Kc], target [B, M, Kt] (int16), counts [B] (int32).

    Indices are row-major patch numbers, ascending. `counts` is the length of each context before it is cut to
    Kc: to the shortest of this call, keeping the row-major prefix (faithful), or to `keep` patches chosen at
    random (fixed).
    """
    batch, blocks = len(ids), spec.num_targets
    corners = np.empty((batch, blocks, 2), np.int64)
    free = np.empty((batch, spec.height, spec.width), bool)
    pending = np.arange(batch)
    for attempt in range(TRIES_PER_REGION * blocks + 1 if spec.faithful else MAX_ATTEMPTS):
        some = ids[pending]
        if attempt == 0 or not spec.faithful:  # the reference redraws the context alone
            for m in range(blocks):
                words = _words(spec, some, TARGETS, attempt << 8 | m // 2)[:, 2 * (m % 2) : 2 * (m % 2) + 2]
                corners[pending, m] = _corner(spec, words, spec.target_h, spec.target_w)
        words = _words(spec, some, CONTEXT, attempt << 8)
        window = _corner(spec, words, spec.context_h, spec.context_w)
        left = _inside(spec, window, spec.context_h, spec.context_w)
        for m in range(blocks - attempt // TRIES_PER_REGION if spec.faithful else blocks):
            left &= ~_inside(spec, corners[pending, m], spec.target_h, spec.target_w)
        free[pending] = left
        count = left.sum((1, 2))
        pending = pending[count <= spec.min_keep if spec.faithful else count < spec.keep]
        if len(pending) == 0:
            break
    if len(pending) > 0:
        raise RuntimeError(f"no context for sample {ids[pending[0]]} at {spec}")

    counts = free.sum((1, 2))
    keep = int(counts.min()) if spec.faithful else spec.keep
    rank = np.arange(spec.height * spec.width)
    picked = rank < np.full((batch, 1), keep) if spec.faithful else _random_subset(spec, ids, counts)
    # Both sides of the indexing list the free patches of all images in one row-major order.
    patch = np.nonzero(free.reshape(batch, -1))[1]
    context = patch[picked[rank < counts[:, None]]].reshape(batch, keep)
    block = np.arange(spec.target_h)[:, None] * spec.width + np.arange(spec.target_w)
    target = (corners[..., :1] * spec.width + corners[..., 1:]) + block.reshape(-1)
    return context.astype(np.int16), target.astype(np.int16), counts.astype(np.int32)
