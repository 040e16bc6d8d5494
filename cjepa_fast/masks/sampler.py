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

from cjepa_fast import ops
from cjepa_fast.errors import UserError
from cjepa_fast.philox import philox4x32
from cjepa_fast.reference import masks as reference_masks
from cjepa_fast.reference.masks import MAX_SIDE, MAX_TARGETS, MaskSpec, Mode

Range = tuple[float, float]
Size = tuple[int, int]

_WORD = 1 << 32
_CONTEXT_ASPECT = (1.0, 1.0)
_TAIL = 128  # Kc is the 1/128 quantile of the raw count: what the released per-GPU batch of 128 leaves
_SIMULATED = 4096
_SIMULATED_SEED = 2**64 - 1  # of no training run
# a batch's total length exceeds its mean by that much in less than one step in a million, the distributions' skewness
# included; for unions, whose cut would hand the loss wrong targets, in none of any run
_DEVIATIONS = {"cap": 5, "union_cap": 8}
_CHUNK = 256  # steps whose sizes are drawn at once
_LENGTHS = 32  # of trimmed lists: a 64th of a list is padding then, on average

MODES = tuple(mode.name.lower() for mode in Mode)


class Masks(NamedTuple):
    """Masks of B images with M targets of Kt patches each, N patches in all: int16 except where noted.

    Patch numbers are row-major and ascend, as do slots, which are positions in the image's own list. None: not asked
    for, or not a part of the mode.
    """

    context: torch.Tensor  # [B, Kc]; packed: [cap], image after image, then -1
    target: torch.Tensor  # [B, M, Kt]
    offsets: torch.Tensor | None = None  # packed: int32 [B + 1], where each image's context begins, and the end
    image_of: torch.Tensor | None = None  # packed: int32 [cap], the image of each token, -1 behind the last
    inverse: torch.Tensor | None = None  # [B, N], slot of each patch in its image's context, -1 if it is not there
    union: torch.Tensor | None = None  # [union_cap], patches of any target, image after image, then -1
    union_offsets: torch.Tensor | None = None  # int32 [B + 1], where each image's union begins, and the end
    target_slot: torch.Tensor | None = None  # [B, M, Kt], slot of each target patch in the union

    def to(self, device: torch.device) -> Masks:
        """Copies CPU tensors; to a GPU from pinned memory, the only kind the host need not wait for."""

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cpu" or tensor.device == device:
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        return Masks(*(None if tensor is None else copy(tensor) for tensor in self))  # pyright: ignore[reportArgumentType]

    def trimmed(self) -> Masks:
        """Views of packed lists with little of their padding: they end soon behind the last entry, whose place the host
        reads, in one of `_LENGTHS` places.

        Not with that entry: oneDNN keeps up to a megabyte for every number of rows that it has multiplied.
        """

        def cut(entries: torch.Tensor | None, offsets: torch.Tensor | None) -> torch.Tensor | None:
            if entries is None or offsets is None:
                return entries
            unit = -(-len(entries) // _LENGTHS)
            return entries[: -(-int(offsets[-1]) // unit) * unit]

        return self._replace(
            context=cut(self.context, self.offsets), image_of=cut(self.image_of, self.offsets),
            union=cut(self.union, self.union_offsets),
        )  # fmt: skip


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
    """Context lengths before any cut, ascending, from a simulation."""
    return np.sort(ops.sample_masks(spec, np.arange(_SIMULATED), impl=impl).counts)


@lru_cache
def _union_lengths(impl: str, spec: MaskSpec) -> np.ndarray:
    arrays = ops.sample_masks(spec, np.arange(_SIMULATED), impl=impl, union=True)
    assert arrays.union_offsets is not None
    return np.diff(arrays.union_offsets)


@lru_cache(maxsize=4)
def _size_words(seed: int, chunk: int) -> list[list[int]]:
    """The words of stream 0 for the steps [chunk * _CHUNK, (chunk + 1) * _CHUNK)."""
    counter = np.zeros((_CHUNK, 4), np.uint32)
    counter[:, 2] = np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)
    counter[:, 3] = reference_masks.SIZES << 28
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).tolist()


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
        if sample_ids.device.type != "cpu":
            raise UserError(f"sample_ids is on {sample_ids.device}: pass a tensor on the CPU")
        sample_ids = sample_ids.numpy()
    ids = np.asarray(sample_ids)
    if ids.ndim != 1 or ids.size == 0:
        raise UserError(f"sample_ids has shape {list(ids.shape)}: pass one row with at least one sample id")
    if ids.dtype.kind not in "iu":
        raise UserError(f"sample_ids has dtype {ids.dtype}: pass integers from 0 to 2**63 - 1")
    for extreme in (ids.min(), ids.max()):
        if not 0 <= extreme < 2**63:
            raise UserError(f"sample_ids holds {extreme}: ids run from 0 to 2**63 - 1")
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
        packed: the blocks of fixed, redrawn while fewer than `min_keep` context patches are left; all those left
            are kept, and the contexts of the batch lie one behind another.
        rasterized, block, random: the poorer samplers of I-JEPA's Table 6. The context is the complement of the
            targets, which are three quadrants of the grid (sides even; no scale or aspect matters), one block (scale
            0.6 in the paper), or as many random patches as target_scale, which must be one number twice, says.

    Args:
        grid: patches per side, or (height, width); each from 2 to 64.
        mode: one of the above.
        seed: 0 <= seed < 2**64.
        target_scale, target_aspect: area as a fraction of the grid, and height / width, of a target block.
        context_scale: area of the square context window as a fraction of the grid.
        num_targets: target blocks per image, M; 3 for rasterized, 1 for block and random.
        min_keep: fewest patches of a target block and of a context (faithful: one more than this).
        context_keep: Kc for every block size instead of the quantile; fixed mode only.
        impl: "native" (C++), "numpy" or "cuda" (same bits), or "auto": native if it is there or can be built, else
            numpy. With "cuda" the masks are made on torch's current GPU, and only faithful mode waits for it.

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
        height, width = (_check_int("grid", side, 2, MAX_SIDE) for side in sides)
        if mode not in MODES:
            raise UserError(f"mode={mode!r} is not known: use one of {', '.join(MODES)}")
        self.grid: Size = (height, width)
        self.mode = mode
        self.seed = _check_int("seed", seed, 0, 2**64 - 1)
        self.num_targets = _check_int("num_targets", num_targets, 1, MAX_TARGETS)
        self.min_keep = _check_int("min_keep", min_keep, 1, MAX_SIDE**2)
        self.context_keep = None if context_keep is None else _check_int("context_keep", context_keep, 1, MAX_SIDE**2)
        if context_keep is not None and mode != "fixed":
            raise UserError(f"context_keep={context_keep} has no meaning in {mode} mode: leave it out")
        blocks = {"rasterized": 3, "block": 1, "random": 1}.get(mode, self.num_targets)
        if self.num_targets != blocks:
            raise UserError(f"num_targets={num_targets} does not fit {mode} mode: use {blocks}")
        if mode == "rasterized" and (height % 2 or width % 2):
            raise UserError(f"grid={grid!r} has no quadrants for rasterized mode: use even sides")
        self.impl = ops.mask_sampler(impl)
        self._simulator = ops.mask_sampler("auto") if self.impl == "cuda" else self.impl
        self._room_for = 0  # images that the CUDA sampler's workspace serves
        self._workspace = self._status = torch.empty(0)

        self._mode = Mode[mode.upper()]
        self._limit = (height - 1, width - 1) if mode == "faithful" else (height, width)
        self._target = (
            _check_range("target_scale", target_scale, 1.0),
            _check_range("target_aspect", target_aspect, MAX_SIDE),
        )
        self._context = (_check_range("context_scale", context_scale, 1.0), _CONTEXT_ASPECT)
        self._target_sizes, self._context_sizes = self._sizes()
        self._keep = self._context_lengths()
        self._rooms: dict[tuple[Any, ...], int] = {}

    def _sizes(self) -> tuple[dict[Size, float], dict[Size, float]]:
        """The sizes of targets and of windows that a step can have, with their probabilities."""
        height, width = self.grid
        if self.mode == "rasterized":
            quadrant = {(height // 2, width // 2): 1.0}
            return quadrant, quadrant
        if self.mode == "random":
            low, high = self._target[0]
            if low < high:
                raise UserError(f"target_scale={(low, high)} is a range, random mode takes one scale: use (0.6, 0.6)")
            return {(1, round(height * width * low)): 1.0}, {self.grid: 1.0}
        # The paper draws scale and aspect each from its range; one draw for both is a quirk of the code. Two
        # draws give 8 shapes (Kc, Kt) on 14x14 and 16x16, 16 on 28x28 (one: 4, 5, 8): still a graph for each.
        quirk = self.mode == "faithful"
        target = _size_probabilities(height * width, *self._target, self._limit, quirk)
        if self.mode == "block":
            return target, {self.grid: 1.0}
        return target, _size_probabilities(height * width, *self._context, self._limit, quirk)

    def _simulation(self, target: Size, context: Size, keep: int = 0) -> MaskSpec:
        """Of packed mode too by the fixed sampler, which draws the same blocks if `keep` is the least length."""
        mode = Mode.FIXED if self._mode == Mode.PACKED else self._mode
        return MaskSpec(_SIMULATED_SEED, 0, mode, *self.grid, self.num_targets, *target, *context, self.min_keep, keep)

    def _context_lengths(self) -> dict[int, int]:
        """Kc for each target area, where it is constant; refuses a `min_keep` that some block size cannot meet."""
        # What bounds min_keep: the largest it may be, why, and another remedy.
        limits: list[tuple[int, str, str]] = []
        patches, keep = math.prod(self.grid), dict[int, int]()
        h, w = min(self._target_sizes, key=math.prod)
        if self.mode == "rasterized":
            limits.append((h * w, f"a quadrant is a {h}x{w} block", "a larger grid"))
            keep = {h * w: h * w}
        elif self.mode in ("block", "random"):
            keep = {h * w: patches - h * w for h, w in self._target_sizes}
            limits.append((h * w, f"target_scale allows {h * w} target patches", "a larger target_scale"))
            left = min(keep.values())
            limits.append((left, f"target_scale leaves {left} context patches", "a smaller target_scale"))
        else:
            for name, sizes in (("target", self._target_sizes), ("context", self._context_sizes)):
                h, w = min(sizes, key=math.prod)
                allowed = h * w - (self.mode == "faithful")
                limits.append((allowed, f"{name}_scale allows a {h}x{w} block", f"a larger {name}_scale"))
        simulated = self.mode in ("fixed", "packed") and min(limits)[0] > 0
        for h, w in self._target_sizes if simulated else ():
            # Every larger window contains one of the smallest, so the smallest alone decides the quantile.
            window = min(self._context_sizes, key=math.prod)
            counts = _raw_counts(self._simulator, self._simulation((h, w), window))
            quantile, median = int(counts[_SIMULATED // _TAIL]), int(counts[_SIMULATED // 2])
            if self.mode == "fixed":
                keep[h * w] = self.context_keep or max(min(quantile, keep.get(h * w, quantile)), self.min_keep)
            cause = f"{self.num_targets} targets of {h}x{w} often leave only {median} context patches"
            remedy = "fewer num_targets, a smaller target_scale or a larger context_scale"
            if keep.get(h * w, 0) > max(median, self.min_keep):
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
        """(h, w) of the target blocks and of the context window at `step`, the same for every sample.

        The targets of random mode, which are no blocks, count as 1 x Kt.
        """
        step = _check_int("step", step, 0, _WORD - 1)
        if len(self._target_sizes) == len(self._context_sizes) == 1:
            return next(iter(self._target_sizes)), next(iter(self._context_sizes))
        words = _size_words(self.seed, step // _CHUNK)[step % _CHUNK]
        target_scale, target_aspect, context_scale, context_aspect = words
        if self.mode == "faithful":
            target_aspect, context_aspect = target_scale, context_scale
        patches = math.prod(self.grid)
        target = _sides(_area(target_scale, patches, self._target[0]), target_aspect, self._target[1], self._limit)
        if self.mode == "block":
            return target, self.grid
        area = _area(context_scale, patches, self._context[0])
        return target, _sides(area, context_aspect, self._context[1], self._limit)

    def _room(self, kind: str, target: Size, context: Size, batch_size: int) -> int:
        """Slots for the contexts ("cap") or the unions ("union_cap") of a batch; one for all targets of an area."""
        area = math.prod(target)
        key = kind, area, context, batch_size
        if key not in self._rooms:
            covered = min(math.prod(self.grid), self.num_targets * area)
            most = batch_size * (math.prod(context) if kind == "cap" else covered)
            if self._mode in (Mode.RASTERIZED, Mode.BLOCK, Mode.RANDOM):
                self._rooms[key] = most
                return most
            room = 0.0
            for size in (size for size in self._target_sizes if math.prod(size) == area):
                spec = self._simulation(size, context, self.min_keep if self._mode == Mode.PACKED else 0)
                if kind == "cap":
                    lengths = _raw_counts(self._simulator, spec)
                else:
                    lengths = _union_lengths(self._simulator, spec._replace(union_cap=_SIMULATED * covered))
                # of the total, and of the simulated mean that stands for the true one
                deviation = float(lengths.std()) * math.sqrt(batch_size + batch_size**2 / _SIMULATED)
                room = max(room, batch_size * float(lengths.mean()) + _DEVIATIONS[kind] * deviation)
            self._rooms[key] = min(math.ceil(room / 16) * 16, most)
        return self._rooms[key]

    def spec(self, step: int, batch_size: int, *, union: bool = False) -> MaskSpec:
        """What the masks of `batch_size` ids at `step` depend on, apart from the ids.

        It holds the room for the contexts of packed mode and, if asked for, for the unions: a constant for each block
        size and batch size, five (unions: eight) standard deviations above the mean total. In the one step in a million
        where that is not enough for contexts, the last patches of the batch are left out and the offsets end at the
        room.
        """
        batch_size = _check_int("batch_size", batch_size, 1, _WORD)
        target, context = self.block_sizes(step)
        return MaskSpec(
            *(self.seed, step, self._mode, *self.grid, self.num_targets, *target, *context, self.min_keep),
            keep=self._keep.get(math.prod(target), 0),
            cap=self._room("cap", target, context, batch_size) if self._mode == Mode.PACKED else 0,
            union_cap=self._room("union_cap", target, context, batch_size) if union else 0,
        )

    def sample(
        self,
        step: int,
        sample_ids: Sequence[int] | np.ndarray | torch.Tensor,
        *,
        inverse: bool = False,
        union: bool = False,
    ) -> Masks:
        """Masks of the samples `sample_ids` [B] (global ids, 0 <= id < 2**63) at `step` (0 <= step < 2**32).

        Args:
            inverse: also give `Masks.inverse`.
            union: also give `Masks.union`, `union_offsets` and `target_slot`. Row union_offsets[b] + target_slot[b]
                of a packed list is always in bounds, also if it had to be cut (see `spec`).

        Raises:
            UserError: step or an id is out of range, or the ids are not one row of integers on the CPU.
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
        """The masks of `sample` for each of `parts` equal runs of the ids: micro-batches of one step.

        In faithful mode the contexts of all are cut to the shortest of all. Raises as `sample`.
        """
        ids = _check_ids(sample_ids)
        masks = [self.sample(step, part, union=union) for part in np.split(ids, parts)]
        if self.mode == "faithful":
            shortest = min(mask.context.shape[1] for mask in masks)
            masks = [mask._replace(context=mask.context[:, :shortest]) for mask in masks]
        return masks

    def _sample_on_gpu(self, spec: MaskSpec, ids: np.ndarray, inverse: bool, union: bool) -> Masks:
        # the step travels with the ids, in one copy from pinned memory that the host need not wait for
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
        """Raises RuntimeError if some image ever found no context; waits for the GPU. On the CPU `sample` raises."""
        if self._status.any():
            raise RuntimeError("the CUDA mask sampler found no context for some image: use a larger context_scale")

    def shapes(self) -> tuple[tuple[float, int | None, int], ...]:
        """Every (probability, Kc, Kt) a step can have; Kc is None in faithful and packed mode, where it varies."""
        probability: dict[int, float] = {}
        for size, p in self._target_sizes.items():
            probability[math.prod(size)] = probability.get(math.prod(size), 0.0) + p
        return tuple((p, self._keep.get(area), area) for area, p in sorted(probability.items()))

    def expected_tokens(self, batch_size: int = 128) -> tuple[float, float]:
        """Mean (Kc, Kt) over steps, for FLOP estimates.

        `batch_size`, the ids per call, matters in faithful mode alone. There and in packed mode, whose mean leaves
        out the padding, Kc is estimated from 4096 simulated images per block size.
        """
        batch_size = _check_int("batch_size", batch_size, 1, _WORD)
        mean_target = sum(p * area for p, _, area in self.shapes())
        if self._keep:
            return sum(p * self._keep[area] for p, _, area in self.shapes()), mean_target
        cut, least = (batch_size, 0) if self.mode == "faithful" else (1, self.min_keep)
        mean_context = 0.0
        for target, p in self._target_sizes.items():
            for context, q in self._context_sizes.items():
                counts = _raw_counts(self._simulator, self._simulation(target, context, least))
                # Of N sorted counts, the i-th is the least of B drawn with replacement with this probability.
                survival = (np.arange(_SIMULATED, -1, -1) / _SIMULATED) ** cut
                mean_context += p * q * float(counts @ (survival[:-1] - survival[1:]))
        return mean_context, mean_target
