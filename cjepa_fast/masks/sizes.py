"""Sizes of blocks: the sizes that a training step can have, with probabilities, and the draw of one of them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from cjepa_fast.errors import UserError
from cjepa_fast.philox import philox4x32
from cjepa_fast.reference import masks as reference_masks

Range = tuple[float, float]
Size = tuple[int, int]  # (height, width) in patches

_WORD = 1 << 32
_CHUNK = 256  # steps whose words are drawn at once


class Blocks(NamedTuple):
    """The sizes that the blocks of one kind can have."""

    sizes: dict[Size, float]  # with the probability of each in a step
    smallest: Size
    bound: str  # for messages: why the smallest block is no larger
    remedy: str
    draw: Callable[[int, int], Size]  # the size for a 32-bit word of scale and one of aspect


# How a mode finds its blocks: from "target" or "context", the grid, and the ranges of scale and aspect.
Kind = Callable[[str, Size, Range, Range], Blocks]


def drawn(name: str, grid: Size, scale: Range, aspect: Range, *, published: bool = False) -> Blocks:
    """Return blocks with a scale and an aspect drawn from ranges for each step (I-JEPA, Sec. 3).

    The paper draws scale and aspect separately. `published` follows the released code: one number drives both, and
    blocks leave out the last row and column.
    """
    limit = (grid[0] - 1, grid[1] - 1) if published else grid
    # Separate draws give 8 shapes (Kc, Kt) on 14x14 and 16x16, 16 on 28x28; one draw gives 4, 5 and 8. Few enough for
    # a CUDA graph each.
    sizes = _probabilities(math.prod(grid), scale, aspect, limit, published)
    h, w = smallest = min(sizes, key=math.prod)
    draw = partial(_drawn_size, math.prod(grid), scale, aspect, limit, published)
    return Blocks(sizes, smallest, f"{name}_scale allows a {h}x{w} block", f"a larger {name}_scale", draw)


def quadrants(name: str, grid: Size, scale: Range, aspect: Range) -> Blocks:
    """Return quarters of the grid. Raises UserError for odd sides."""
    h, w = grid
    if h % 2 or w % 2:
        raise UserError(f"mode: rasterized halves both sides of the grid, which has {h}x{w} patches; use even sides")
    return _one_size((h // 2, w // 2), f"a quadrant is a {h // 2}x{w // 2} block", "a larger grid")


def scattered(name: str, grid: Size, scale: Range, aspect: Range) -> Blocks:
    """Return random patches, which count as blocks of 1 x Kt. Raises UserError for a range of scales."""
    low, high = scale
    if low < high:
        raise UserError(f"{name}_scale: {scale} is a range, random mode takes one scale; use one number twice")
    patches = round(math.prod(grid) * low)
    return _one_size((1, patches), f"{name}_scale allows {patches} patches", f"a larger {name}_scale")


def whole(name: str, grid: Size, scale: Range, aspect: Range) -> Blocks:
    """Return the whole grid as the only block."""
    return _one_size(grid, f"the grid has {math.prod(grid)} patches", "a larger grid")


@lru_cache(maxsize=4)
def _words(seed: int, chunk: int) -> list[list[int]]:
    counter = np.zeros((_CHUNK, 4), np.uint32)
    counter[:, 2] = np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)
    counter[:, 3] = reference_masks.SIZES << 28
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).tolist()


def step_words(seed: int, step: int) -> list[int]:
    """Return the words of target scale, target aspect, context scale and context aspect (`reference.masks`)."""
    return _words(seed, step // _CHUNK)[step % _CHUNK]


def _one_size(size: Size, bound: str, remedy: str) -> Blocks:
    return Blocks({size: 1.0}, size, bound, remedy, partial(_same_size, size))


def _same_size(size: Size, scale_word: int, aspect_word: int) -> Size:
    return size


def _drawn_size(
    patches: int, scale: Range, aspect: Range, limit: Size, one_draw: bool, scale_word: int, aspect_word: int
) -> Size:
    area = _area(scale_word, patches, scale)
    return _sides(area, scale_word if one_draw else aspect_word, aspect, limit)


def _area(word: int, patches: int, scale: Range) -> int:
    return int(patches * (scale[0] + word / _WORD * (scale[1] - scale[0])))


def _sides(area: int, word: int, aspect: Range, limit: Size) -> Size:
    a = aspect[0] + word / _WORD * (aspect[1] - aspect[0])
    return min(round(math.sqrt(area * a)), limit[0]), min(round(math.sqrt(area / a)), limit[1])


@lru_cache
def _probabilities(patches: int, scale: Range, aspect: Range, limit: Size, one_draw: bool) -> dict[Size, float]:
    """Return every size that some pair of 32-bit words gives, with its exact probability."""
    sizes: dict[Size, float] = {}
    for low, high in _constant_pieces(lambda word: _area(word, patches, scale), 0, _WORD):
        area = _area(low, patches, scale)

        def monotone(word: int, area: int = area) -> Size:  # a taller block is a narrower one
            h, w = _sides(area, word, aspect, limit)
            return h, -w

        first, last, weight = (low, high, 1.0) if one_draw else (0, _WORD, (high - low) / _WORD)
        for begin, end in _constant_pieces(monotone, first, last):
            size = _sides(area, begin, aspect, limit)
            sizes[size] = sizes.get(size, 0.0) + weight * (end - begin) / _WORD
    return dict(sorted(sizes.items()))


def _constant_pieces(f: Callable[[int], Any], start: int, stop: int) -> list[tuple[int, int]]:
    """Split [start, stop) into the intervals on which the non-decreasing `f` is constant."""
    pieces = []
    while start < stop:
        end = bisect_right(range(stop), f(start), start, stop, key=f)
        pieces.append((start, end))
        start = end
    return pieces
