"""The mask sampler and its table of modes."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from cjepa_fast import ops
from cjepa_fast.errors import UserError
from cjepa_fast.masks.batch import Masks
from cjepa_fast.masks.sizes import Blocks, Kind, Range, Size, drawn, quadrants, scattered, step_words, whole
from cjepa_fast.reference.masks import MAX_SIDE, MAX_TARGETS, MaskSpec, Mode

_CONTEXT_ASPECT = (1.0, 1.0)
_TAIL = 128  # fixed: Kc is the 1/128 quantile of the raw count, which the released per-GPU batch of 128 leaves
_SIMULATED = 4096  # images
_SIMULATED_SEED = 2**64 - 1  # of no training run
# Room for a batch, in standard deviations above the mean total. Contexts overflow in less than one step in a million,
# the skewness of the distributions included. Unions never overflow, because a cut union gives the loss wrong targets.
_DEVIATIONS = {"cap": 5, "union_cap": 8}


class Context(Enum):
    """The patches of the window outside the targets that an image keeps as its context."""

    SUBSET = "a uniformly random Kc of them, so that no position is favoured"
    PREFIX = "the first of them, as many as the shortest context of the batch has"
    ALL = "all of them"
    COMPLEMENT = "all of them; the window is the grid or the quadrant that is no target, so nothing is ever redrawn"


class MaskMode(NamedTuple):
    """A row of the table of modes."""

    code: Mode  # of the samplers in C++, CUDA and NumPy
    target: Kind
    window: Kind
    context: Context
    num_targets: int | None = None  # the only number that fits; None: any

    @property
    def lengths_vary(self) -> bool:
        """Return whether contexts differ in length between steps of one block size, or between images."""
        return self.context in (Context.PREFIX, Context.ALL)


_published = partial(drawn, published=True)

MODES = {
    # The paper's blocks. Images with fewer than Kc patches left redraw all their blocks: under 1 %, or as many as
    # `min_keep` makes. Kc belongs to the target area and does not depend on the batch.
    "fixed": MaskMode(Mode.FIXED, drawn, drawn, Context.SUBSET),
    # The distribution of the released code with its quirks. Contexts need one patch more than `min_keep`. If redrawing
    # the window fails often, targets may overlap the context.
    "faithful": MaskMode(Mode.FAITHFUL, _published, _published, Context.PREFIX),
    # The blocks of fixed, redrawn while fewer than `min_keep` patches are left; contexts follow each other in one list.
    "packed": MaskMode(Mode.PACKED, drawn, drawn, Context.ALL),
    # The weaker samplers of I-JEPA's Table 6, where the block and the random patches have scale 0.6.
    "rasterized": MaskMode(Mode.RASTERIZED, quadrants, quadrants, Context.COMPLEMENT, num_targets=3),
    "block": MaskMode(Mode.BLOCK, drawn, whole, Context.COMPLEMENT, num_targets=1),
    "random": MaskMode(Mode.RANDOM, scattered, whole, Context.COMPLEMENT, num_targets=1),
}


@lru_cache
def _simulated_lengths(impl: str, spec: MaskSpec) -> np.ndarray:
    """Return lengths of unions if the spec has room for unions, else of contexts before any cut, ascending."""
    arrays = ops.sample_masks(spec, np.arange(_SIMULATED), impl=impl, union=spec.union_cap > 0)
    return np.sort(arrays.counts) if arrays.union_offsets is None else np.diff(arrays.union_offsets)


def _check_range(name: str, value: Sequence[float], upper: float) -> Range:
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not 0.0 < low <= high <= upper:
        raise UserError(f"{name}: {value!r} is no range; use LOW HIGH with 0 < LOW <= HIGH <= {upper:g}")
    return low, high


def _check_int(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name}: {value!r} is no integer; use {low} to {high}") from None
    if not low <= number <= high:
        raise UserError(f"{name}: {number} is out of range; use {low} to {high}")
    return number


def _check_ids(sample_ids: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(sample_ids, torch.Tensor):
        if sample_ids.device.type != "cpu":
            raise UserError(f"sample_ids: a tensor on {sample_ids.device}; pass a tensor on the CPU")
        sample_ids = sample_ids.numpy()
    ids = np.asarray(sample_ids)
    if ids.ndim != 1 or ids.size == 0:
        raise UserError(f"sample_ids: shape {list(ids.shape)}; pass one dimension with at least one sample id")
    if ids.dtype.kind not in "iu":
        raise UserError(f"sample_ids: dtype {ids.dtype}; pass integers from 0 to 2**63 - 1")
    for extreme in (ids.min(), ids.max()):
        if not 0 <= extreme < 2**63:
            raise UserError(f"sample_ids: {extreme} is out of range; pass integers from 0 to 2**63 - 1")
    return np.ascontiguousarray(ids, np.int64)


class MultiBlockSampler:
    """The multi-block masks of I-JEPA (Assran et al., CVPR 2023, Sec. 3) as a function of (seed, step, sample id).

    The masks of an id at a step do not depend on the world size, the split of the batch, the number of workers or
    threads, or a restart; only the cut of faithful mode depends on the batch. The block sizes depend on seed and step
    alone: one size for the whole batch, on every rank.

    Args:
        grid: patches per side, or (height, width); each from 2 to 64.
        mode: a key of `MODES`, which describes the modes.
        target_scale, target_aspect: (low, high) of a target block's area as a fraction of the grid, and of its height /
            width. Rasterized mode ignores both; random mode takes one scale twice and ignores the aspect.
        context_scale: (low, high) of the area of the square context window as a fraction of the grid.
        num_targets: target blocks per image, M, at most 64; 3 for rasterized, 1 for block and random.
        min_keep: fewest patches of a target block and of a context (faithful: one more than this).
        context_keep: fixed mode: Kc for every block size. None takes the 1/128 quantile of the patches left, at least
            `min_keep`.
        seed: 0 <= seed < 2**64.
        impl: "native" (C++), "numpy" or "cuda" give the same bits; "auto" is native if available, else numpy. "cuda"
            makes the masks on torch's current GPU, and only faithful mode waits for the GPU.

    Raises:
        UserError: an argument is out of range, or some block size cannot satisfy `min_keep`. The message starts with
            the argument's name and a colon.
    """

    def __init__(
        self,
        grid: int | Sequence[int],
        *,
        mode: str,
        target_scale: Sequence[float],
        target_aspect: Sequence[float],
        context_scale: Sequence[float],
        num_targets: int,
        min_keep: int,
        context_keep: int | None = None,
        seed: int = 0,
        impl: str = "auto",
    ) -> None:
        sides = tuple(grid) if isinstance(grid, Sequence) else (grid, grid)
        if len(sides) != 2:
            raise UserError(f"grid: {grid!r} is no grid; use patches per side, or (height, width)")
        height, width = (_check_int("grid", side, 2, MAX_SIDE) for side in sides)
        if mode not in MODES:
            raise UserError(f"mode: {mode!r} is not known; use one of {', '.join(MODES)}")
        self.grid: Size = (height, width)
        self.mode = mode
        self.rule = rule = MODES[mode]
        self.seed = _check_int("seed", seed, 0, 2**64 - 1)
        self.num_targets = _check_int("num_targets", num_targets, 1, MAX_TARGETS)
        if rule.num_targets not in (None, num_targets):
            raise UserError(f"num_targets: {num_targets} does not fit mode {mode}; use {rule.num_targets}")
        self.min_keep = _check_int("min_keep", min_keep, 1, MAX_SIDE**2)
        self.context_keep = None if context_keep is None else _check_int("context_keep", context_keep, 1, MAX_SIDE**2)
        if context_keep is not None and rule.context is not Context.SUBSET:
            raise UserError(f"context_keep: {context_keep} has no meaning in mode {mode}; use None")
        target_ranges = _check_range("target_scale", target_scale, 1), _check_range("target_aspect", target_aspect, 64)
        self._target: Blocks = rule.target("target", self.grid, *target_ranges)
        context_range = _check_range("context_scale", context_scale, 1)
        self._window: Blocks = rule.window("context", self.grid, context_range, _CONTEXT_ASPECT)

        self.impl = ops.mask_sampler(impl)
        self._simulator = ops.mask_sampler("auto") if self.impl == "cuda" else self.impl
        self._least = self.min_keep if rule.context is Context.ALL else 0  # context length, in simulations
        self._room_for = 0  # images that the CUDA sampler's workspace serves
        self._workspace = self._status = torch.empty(0)
        self._keep = self._context_lengths()
        self._rooms: dict[tuple[Any, ...], int] = {}

    def _simulation(self, target: Size, window: Size, keep: int) -> MaskSpec:
        # The fixed sampler draws the blocks of packed mode too, if `keep` is the least length.
        code = Mode.FIXED if self.rule.context is Context.ALL else self.rule.code
        return MaskSpec(_SIMULATED_SEED, 0, code, *self.grid, self.num_targets, *target, *window, self.min_keep, keep)

    def _context_lengths(self) -> dict[int, int]:
        """Return Kc for each target area, where Kc is constant. Raises UserError if `min_keep` cannot be met."""
        context, keep = self.rule.context, dict[int, int]()
        # Each limit: the largest possible min_keep, the cause, and another remedy than a smaller min_keep.
        limits = [
            (math.prod(blocks.smallest) - (context is Context.PREFIX), blocks.bound, blocks.remedy)
            for blocks in (self._target, self._window)
        ]
        if context is Context.COMPLEMENT:
            keep = {h * w: math.prod(self.grid) - self.num_targets * h * w for h, w in self._target.sizes}
            left = min(keep.values())
            limits.append((left, f"target_scale leaves {left} context patches", "a smaller target_scale"))
        simulated = context in (Context.SUBSET, Context.ALL) and min(limits)[0] > 0
        for h, w in self._target.sizes if simulated else ():
            # Every larger window contains one of the smallest, so the smallest alone decides the quantile.
            counts = _simulated_lengths(self._simulator, self._simulation((h, w), self._window.smallest, 0))
            quantile, median = int(counts[_SIMULATED // _TAIL]), int(counts[_SIMULATED // 2])
            if context is Context.SUBSET:
                keep[h * w] = self.context_keep or max(min(quantile, keep.get(h * w, quantile)), self.min_keep)
            cause = f"{self.num_targets} targets of {h}x{w} often leave only {median} context patches"
            remedy = "fewer num_targets, a smaller target_scale or a larger context_scale"
            if keep.get(h * w, 0) > max(median, self.min_keep):
                raise UserError(f"context_keep: {self.context_keep} is too many: {cause}; use less, or {remedy}")
            limits.append((median, cause, remedy))
        allowed, cause, remedy = min(limits)
        if self.min_keep > allowed:
            lower = f"min_keep <= {allowed} or " if allowed > 0 else ""
            size = "x".join(map(str, self.grid))
            raise UserError(f"min_keep: {self.min_keep} does not fit the {size} grid: {cause}; use {lower}{remedy}")
        return keep

    def block_sizes(self, step: int) -> tuple[Size, Size]:
        """Return (height, width) of the target blocks and of the context window at `step`, for every sample.

        The targets of random mode, which are no blocks, count as 1 x Kt.
        """
        step = _check_int("step", step, 0, 2**32 - 1)
        target_scale, target_aspect, context_scale, context_aspect = step_words(self.seed, step)
        return self._target.draw(target_scale, target_aspect), self._window.draw(context_scale, context_aspect)

    def _room(self, kind: str, target: Size, window: Size, batch_size: int) -> int:
        """Return slots for the contexts ("cap") or unions ("union_cap") of a batch: one number per target area."""
        area = math.prod(target)
        key = kind, area, window, batch_size
        if key not in self._rooms:
            covered = min(math.prod(self.grid), self.num_targets * area)
            most = batch_size * (math.prod(window) if kind == "cap" else covered)
            if self.rule.context is Context.COMPLEMENT:  # all lengths are equal
                return most
            room = 0.0
            for size in (size for size in self._target.sizes if math.prod(size) == area):
                spec = self._simulation(size, window, self._least)
                if kind == "union_cap":
                    spec = spec._replace(union_cap=_SIMULATED * covered)
                lengths = _simulated_lengths(self._simulator, spec)
                # of the total, and of the simulated mean that stands for the true mean
                deviation = float(lengths.std()) * math.sqrt(batch_size + batch_size**2 / _SIMULATED)
                room = max(room, batch_size * float(lengths.mean()) + _DEVIATIONS[kind] * deviation)
            self._rooms[key] = min(math.ceil(room / 16) * 16, most)
        return self._rooms[key]

    def spec(self, step: int, batch_size: int, *, union: bool = False) -> MaskSpec:
        """Return all that the masks of `batch_size` ids at `step` depend on, apart from the ids.

        The spec holds the room for the contexts of packed mode and, if asked for, for the unions: a constant for each
        block size and batch size, see `_DEVIATIONS`. Contexts that exceed their room lose the last patches of the
        batch, and their offsets end at the room.
        """
        batch_size = _check_int("batch_size", batch_size, 1, 2**32)
        target, window = self.block_sizes(step)
        return MaskSpec(
            *(self.seed, step, self.rule.code, *self.grid, self.num_targets, *target, *window, self.min_keep),
            keep=self._keep.get(math.prod(target), 0),
            cap=self._room("cap", target, window, batch_size) if self.rule.context is Context.ALL else 0,
            union_cap=self._room("union_cap", target, window, batch_size) if union else 0,
        )

    def sample(
        self,
        step: int,
        sample_ids: Sequence[int] | np.ndarray | torch.Tensor,
        *,
        inverse: bool = False,
        union: bool = False,
    ) -> Masks:
        """Return the masks of the samples `sample_ids` [B] (0 <= id < 2**63) at `step` (0 <= step < 2**32).

        Args:
            inverse: also give `Masks.inverse`.
            union: also give `Masks.union`, `union_offsets` and `target_slot`. Entry union_offsets[b] + target_slot[b]
                of a packed list is always in bounds, even if the list had to be cut (see `spec`).

        Raises:
            UserError: step or an id is out of range, or the ids are not integers in one dimension on the CPU.
            RuntimeError: an image finds no context. On a GPU `verify` raises the error.
        """
        ids = _check_ids(sample_ids)
        spec = self.spec(step, len(ids), union=union)
        if self.impl == "cuda":
            return self._sample_on_gpu(spec, ids, inverse, union)
        context, target, _, *maps = ops.sample_masks(spec, ids, impl=self.impl, inverse=inverse, union=union)
        return Masks(
            torch.from_numpy(context),
            torch.from_numpy(target),
            *(None if array is None else torch.from_numpy(array) for array in maps),
        )

    def sample_parts(
        self, step: int, sample_ids: Sequence[int] | np.ndarray | torch.Tensor, parts: int, *, union: bool = False
    ) -> list[Masks]:
        """Return the masks of `sample` for each of `parts` equal runs of the ids: the micro-batches of one step.

        Faithful mode cuts the contexts of all parts to the shortest of all. Raises as `sample`.
        """
        ids = _check_ids(sample_ids)
        masks = [self.sample(step, part, union=union) for part in np.split(ids, parts)]
        if self.rule.context is Context.PREFIX:
            shortest = min(mask.context.shape[1] for mask in masks)
            masks = [mask._replace(context=mask.context[:, :shortest]) for mask in masks]
        return masks

    def _sample_on_gpu(self, spec: MaskSpec, ids: np.ndarray, inverse: bool, union: bool) -> Masks:
        # The step travels with the ids: one copy from pinned memory, for which the host need not wait.
        words = torch.from_numpy(np.append(ids, spec.step)).pin_memory().cuda(non_blocking=True)
        if self._room_for == 0:
            self._status = torch.zeros(1, dtype=torch.int32, device=words.device)
        if self._room_for < len(ids):
            self._room_for, self._workspace = len(ids), ops.mask_workspace(len(ids), str(words.device))
        masks = ops.sample_masks_on_gpu(
            spec, words[-1:], words[:-1], inverse=inverse, union=union, workspace=self._workspace, status=self._status
        )
        context = masks.context if masks.shortest is None else masks.context[:, : int(masks.shortest)]
        return Masks(context, masks.target, *masks[3:-1])

    def verify(self) -> None:
        """Raise RuntimeError if some image ever found no context on the GPU; waits for the GPU."""
        if self._status.any():
            raise RuntimeError("the CUDA mask sampler found no context for some image: use a larger context_scale")

    def shapes(self) -> tuple[tuple[float, int | None, int], ...]:
        """Return every (probability, Kc, Kt) that a step can have; Kc is None in faithful and packed mode."""
        sizes = self._target.sizes
        return tuple(
            (sum(p for (h, w), p in sizes.items() if h * w == area), self._keep.get(area), area)
            for area in sorted({h * w for h, w in sizes})
        )

    def expected_tokens(self, batch_size: int = 128) -> tuple[float, float]:
        """Return the mean (Kc, Kt) over steps, for estimates of cost.

        `batch_size` is the number of ids per call and matters in faithful mode alone. In faithful and packed mode Kc is
        estimated from 4096 simulated images per block size, without padding.
        """
        batch_size = _check_int("batch_size", batch_size, 1, 2**32)
        mean_target = sum(p * area for p, _, area in self.shapes())
        if self._keep:
            return sum(p * self._keep[area] for p, _, area in self.shapes()), mean_target
        cut, mean_context = batch_size if self.rule.context is Context.PREFIX else 1, 0.0
        for target, p in self._target.sizes.items():
            for window, q in self._window.sizes.items():
                counts = _simulated_lengths(self._simulator, self._simulation(target, window, self._least))
                # Of N sorted counts, the i-th is the least of B drawn with replacement with this probability.
                survival = (np.arange(_SIMULATED, -1, -1) / _SIMULATED) ** cut
                mean_context += p * q * float(counts @ (survival[:-1] - survival[1:]))
        return mean_context, mean_target
