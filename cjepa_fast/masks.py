"""Multi-block masks: which patches the context encoder sees and which the predictor must predict."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from cjepa_fast import ops, reference_masks
from cjepa_fast.errors import UserError
from cjepa_fast.philox import philox4x32
from cjepa_fast.reference_masks import MaskSpec

Range = tuple[float, float]
Size = tuple[int, int]

_WORD = 1 << 32
_MAX_SIDE = 64
_MAX_TARGETS = 64
_CONTEXT_ASPECT = (1.0, 1.0)
_TAIL = 128  # Kc is the 1/128 quantile of the raw count: what the released per-GPU batch of 128 leaves
_SIMULATED = 4096


class Masks(NamedTuple):
    """Patch indices of one batch, int64, ascending, row-major."""

    context: torch.Tensor  # [B, Kc]
    target: torch.Tensor  # [B, M, Kt]


def _area(word: int, patches: int, scale: Range) -> int:
    return int(patches * (scale[0] + word / _WORD * (scale[1] - scale[0])))


def _sides(area: int, word: int, aspect: Range, limit: Size) -> Size:
    a = aspect[0] + word / _WORD * (aspect[1] - aspect[0])
    return min(round(math.sqrt(area * a)), limit[0]), min(round(math.sqrt(area / a)), limit[1])


def _constant_pieces(f: Callable[[int], Any], start: int, stop: int) -> list[tuple[int, int]]:
    """Split [start, stop) into the intervals on which the non-decreasing `f` is constant."""
    pieces = []
    while start < stop:
        end = bisect_right(range(stop), f(start), start, stop, key=f)
        pieces.append((start, end))
        start = end
    return pieces


@lru_cache
def _size_probabilities(patches: int, scale: Range, aspect: Range, limit: Size, shared: bool) -> dict[Size, float]:
    """Every (h, w) that some pair of 32-bit words gives, with its exact probability."""
    sizes: dict[Size, float] = {}
    for low, high in _constant_pieces(lambda word: _area(word, patches, scale), 0, _WORD):
        area = _area(low, patches, scale)

        def monotone(word: int, area: int = area) -> Size:  # a taller block is a narrower one
            h, w = _sides(area, word, aspect, limit)
            return h, -w

        first, last, weight = (low, high, 1.0) if shared else (0, _WORD, (high - low) / _WORD)
        for begin, end in _constant_pieces(monotone, first, last):
            size = _sides(area, begin, aspect, limit)
            sizes[size] = sizes.get(size, 0.0) + weight * (end - begin) / _WORD
    return dict(sorted(sizes.items()))


@lru_cache
def _raw_counts(impl: str, spec: MaskSpec) -> np.ndarray:
    """Context lengths before any cut, ascending, from a simulation whose key belongs to no training run."""
    counts = ops.sample_masks(spec, np.arange(_SIMULATED), impl=impl)[2]
    return np.sort(counts)


def _check_range(name: str, value: Sequence[float], upper: float) -> Range:
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not 0.0 < low <= high <= upper:
        raise UserError(f"{name}={value!r} is not a range: use (low, high) with 0 < low <= high <= {upper:g}")
    return low, high


def _check_int(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name}={value!r} is not an integer: use {low} to {high}") from None
    if not low <= number <= high:
        raise UserError(f"{name}={number} is out of range: use {low} to {high}")
    return number


def _check_ids(sample_ids: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(sample_ids, torch.Tensor):
        sample_ids = sample_ids.cpu().numpy()
    ids = np.asarray(sample_ids)
    if ids.ndim != 1 or ids.size == 0:
        raise UserError(f"sample_ids has shape {list(ids.shape)}: pass one row with at least one sample id")
    if ids.dtype.kind not in "iu":
        raise UserError(f"sample_ids has dtype {ids.dtype}: pass integers from 0 to 2**63 - 1")
    wrong = (ids < 0) if ids.dtype.kind == "i" else (ids > np.iinfo(np.int64).max)
    if wrong.any():
        raise UserError(f"sample_ids holds {ids[wrong][0]}: ids run from 0 to 2**63 - 1")
    return np.ascontiguousarray(ids, np.int64)


class MultiBlockSampler:
    """The blocks of I-JEPA (Assran et al., CVPR 2023, Sec. 3) as a function of (seed, step, sample id).

    The same id at the same step has the same masks whatever the world size, the split of the batch, the
    number of workers or threads, or a restart (in faithful mode up to the cut to the batch minimum). The
    block sizes depend on (seed, step) alone: one size for the whole batch, on every rank.

    Modes:
        fixed: blocks reach the whole grid. Every image keeps exactly Kc context patches, a uniformly random
            subset of those left, so no position is favoured and Kc does not depend on the batch. Kc belongs
            to the target area: it is the 1/128 quantile of the number left (what cutting to the minimum of
            the released per-GPU batch of 128 leaves on average), raised to `min_keep` on small grids. The
            images that have fewer left (under 1 %, or as many as `min_keep` makes) redraw all their blocks.
        faithful: the distribution of the published code with its quirks. One random number drives both scale
            and aspect; the last row and column are never used; targets of one image may overlap; the contexts
            are cut to the shortest of the given ids, keeping the row-major prefix. Kc varies.

    Args:
        grid: patches per side, or (height, width); each from 2 to 64.
        mode: "fixed" or "faithful".
        seed: 0 <= seed < 2**64.
        target_scale, target_aspect: area as a fraction of the grid, and height / width, of a target block.
        context_scale: area of the square context window as a fraction of the grid.
        num_targets: target blocks per image, M.
        min_keep: fewest patches of a target block and of a context (faithful: one more than this).
        context_keep: Kc for every block size instead of the quantile; fixed mode only.
        impl: "native" (C++), "numpy" (same bits), or "auto": native if it is there or can be built.

    Raises:
        UserError: an argument is out of range, or some block size cannot satisfy `min_keep`.
    """

    def __init__(
        self,
        grid: int | Sequence[int] = 14,
        mode: str = "fixed",
        seed: int = 0,
        *,
        target_scale: Sequence[float] = (0.15, 0.2),
        target_aspect: Sequence[float] = (0.75, 1.5),
        context_scale: Sequence[float] = (0.85, 1.0),
        num_targets: int = 4,
        min_keep: int = 10,
        context_keep: int | None = None,
        impl: str = "auto",
    ) -> None:
        sides = tuple(grid) if isinstance(grid, Sequence) else (grid, grid)
        if len(sides) != 2:
            raise UserError(f"grid={grid!r} is not a grid: pass patches per side, or (height, width)")
        height, width = (_check_int("grid", side, 2, _MAX_SIDE) for side in sides)
        if mode not in ("fixed", "faithful"):
            raise UserError(f"mode={mode!r} is not known: use 'fixed' or 'faithful'")
        self.grid: Size = (height, width)
        self.mode = mode
        self.seed = _check_int("seed", seed, 0, 2**64 - 1)
        self.num_targets = _check_int("num_targets", num_targets, 1, _MAX_TARGETS)
        self.min_keep = _check_int("min_keep", min_keep, 1, _MAX_SIDE**2)
        self.context_keep = None if context_keep is None else _check_int("context_keep", context_keep, 1, _MAX_SIDE**2)
        if context_keep is not None and mode == "faithful":
            raise UserError(
                f"context_keep={context_keep} has no meaning in faithful mode, whose Kc varies: leave it out"
            )
        self.impl = ops.mask_sampler(impl)

        self._faithful = mode == "faithful"
        self._limit = (height - 1, width - 1) if self._faithful else (height, width)
        self._target = (
            _check_range("target_scale", target_scale, 1.0),
            _check_range("target_aspect", target_aspect, _MAX_SIDE),
        )
        self._context = (_check_range("context_scale", context_scale, 1.0), _CONTEXT_ASPECT)
        self._target_sizes = self._sizes(*self._target)
        self._context_sizes = self._sizes(*self._context)
        self._keep = self._context_lengths()

    def _sizes(self, scale: Range, aspect: Range) -> dict[Size, float]:
        # The paper draws scale and aspect each from its range; one draw for both is a quirk of the code. Two
        # draws give 8 shapes (Kc, Kt) on 14x14 and 16x16, 16 on 28x28 (one: 4, 5, 8): still a graph for each.
        return _size_probabilities(math.prod(self.grid), scale, aspect, self._limit, shared=self._faithful)

    def _spec(self, seed: int, step: int, target: Size, context: Size, keep: int) -> MaskSpec:
        return MaskSpec(
            seed, step, self._faithful, *self.grid, self.num_targets, *target, *context, self.min_keep, keep
        )

    def _context_lengths(self) -> dict[int, int]:
        """Kc for each target area (fixed mode); refuses a `min_keep` that some block size cannot meet."""
        # What bounds min_keep: the largest it may be, why, and another remedy.
        limits: list[tuple[int, str, str]] = []
        for name, sizes in (("target", self._target_sizes), ("context", self._context_sizes)):
            h, w = min(sizes, key=math.prod)
            allowed = h * w - self._faithful
            limits.append((allowed, f"{name}_scale allows a {h}x{w} block", f"a larger {name}_scale"))
        keep: dict[int, int] = {}
        for h, w in () if self._faithful or min(limits)[0] == 0 else self._target_sizes:
            # Every larger window contains one of the smallest, so the smallest alone decides the quantile.
            window = min(self._context_sizes, key=math.prod)
            counts = _raw_counts(self.impl, self._spec(2**64 - 1, 0, (h, w), window, keep=0))
            quantile, median = int(counts[_SIMULATED // _TAIL]), int(counts[_SIMULATED // 2])
            keep[h * w] = self.context_keep or max(min(quantile, keep.get(h * w, quantile)), self.min_keep)
            cause = f"{self.num_targets} targets of {h}x{w} often leave only {median} context patches"
            remedy = "fewer num_targets, a smaller target_scale or a larger context_scale"
            if keep[h * w] > max(median, self.min_keep):
                raise UserError(f"context_keep={self.context_keep} is too many: {cause}; use less, or {remedy}")
            limits.append((median, cause, remedy))
        allowed, cause, remedy = min(limits)
        if self.min_keep > allowed:
            lower = f"min_keep <= {allowed} or " if allowed > 0 else ""
            raise UserError(
                f"min_keep={self.min_keep} cannot be met on a {self.grid[0]}x{self.grid[1]} grid: {cause}; "
                f"use {lower}{remedy}"
            )
        return keep

    def block_sizes(self, step: int) -> tuple[Size, Size]:
        """(h, w) of the target blocks and of the context window at `step`, the same for every sample."""
        counter = np.array((0, 0, step, reference_masks.SIZES << 28), np.uint32)
        words = philox4x32(counter, (self.seed & 0xFFFFFFFF, self.seed >> 32)).tolist()
        if self._faithful:
            words[1], words[3] = words[0], words[2]
        patches = math.prod(self.grid)
        target = _sides(_area(words[0], patches, self._target[0]), words[1], self._target[1], self._limit)
        context = _sides(_area(words[2], patches, self._context[0]), words[3], self._context[1], self._limit)
        return target, context

    def sample(self, step: int, sample_ids: Sequence[int] | np.ndarray | torch.Tensor) -> Masks:
        """Masks of the samples `sample_ids` [B] (global ids, 0 <= id < 2**63) at `step` (0 <= step < 2**32).

        Returns context [B, Kc] and target [B, M, Kt], int64 on the CPU, ascending row-major patch indices.
        """
        step = _check_int("step", step, 0, _WORD - 1)
        ids = _check_ids(sample_ids)
        target, context = self.block_sizes(step)
        spec = self._spec(self.seed, step, target, context, self._keep.get(math.prod(target), 0))
        context_index, target_index, _ = ops.sample_masks(spec, ids, impl=self.impl)
        return Masks(torch.from_numpy(context_index.astype(np.int64)), torch.from_numpy(target_index.astype(np.int64)))

    def shapes(self) -> tuple[tuple[float, int | None, int], ...]:
        """Every (probability, Kc, Kt) a step can have; Kc is None in faithful mode, where it varies."""
        probability: dict[int, float] = {}
        for size, p in self._target_sizes.items():
            probability[math.prod(size)] = probability.get(math.prod(size), 0.0) + p
        return tuple((p, self._keep.get(area), area) for area, p in sorted(probability.items()))

    def expected_tokens(self, batch_size: int = 128) -> tuple[float, float]:
        """Mean (Kc, Kt) over steps, for FLOP estimates.

        `batch_size`, the ids per call, matters in faithful mode alone, where Kc is estimated from 4096
        simulated images per block size.
        """
        batch_size = _check_int("batch_size", batch_size, 1, _WORD)
        mean_target = sum(p * area for p, _, area in self.shapes())
        if not self._faithful:
            return sum(p * (keep or 0) for p, keep, _ in self.shapes()), mean_target
        mean_context = 0.0
        for target, p in self._target_sizes.items():
            for context, q in self._context_sizes.items():
                counts = _raw_counts(self.impl, self._spec(2**64 - 1, 0, target, context, keep=0))
                # Of N sorted counts, the i-th is the least of B drawn with replacement with this probability.
                survival = (np.arange(_SIMULATED, -1, -1) / _SIMULATED) ** batch_size
                mean_context += p * q * float(counts @ (survival[:-1] - survival[1:]))
        return mean_context, mean_target
