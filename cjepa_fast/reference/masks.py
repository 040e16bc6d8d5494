"""The truth of the mask samplers in plain NumPy; csrc/mask_sampler.cpp and csrc/mask_sampler.cu give the same bits.

Every random number is a word of Philox4x32-10 (Salmon et al., SC 2011) at an address; no state is drawn from. A mask
therefore depends on (seed, step, sample id) alone:

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (id low 32 bits, id high 32 bits, step, stream << 28 | attempt << 8 | block)

    stream 0  sizes     id 0, block 0: words for target scale, target aspect, context scale, context aspect
    stream 1  targets   block m // 2: words 2 (m % 2) and 2 (m % 2) + 1 are the row and column of target m
    stream 2  context   block 0: words 0 and 1 are the row and column of the window; rasterized: word 0, the quadrant
    stream 3  subset    low 28 bits i // 4: word i % 4 is the i-th draw of the subset (fixed, random)

A word u becomes an integer in [0, n) as (u * n) >> 32. Nothing after the block sizes is floating point.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from cjepa_fast.philox import philox4x32

SIZES, TARGETS, CONTEXT, SUBSET = range(4)
TRIES_PER_REGION = 20  # faithful: failed attempts before one more target may overlap the context
MAX_SIDE, MAX_TARGETS = 64, 64
MAX_ATTEMPTS = 64  # fixed, packed: an attempt fails for 1 image in 128, with a large min_keep for 1 in 2 at worst


class Mode(IntEnum):
    """The modes: csrc/mask_spec.h specifies them, `cjepa_fast.masks.MODES` describes them."""

    FIXED = 0
    FAITHFUL = 1
    PACKED = 2
    RASTERIZED = 3
    BLOCK = 4
    RANDOM = 5


class MaskSpec(NamedTuple):
    """All that the masks of one call depend on, apart from the sample ids."""

    seed: int
    step: int
    mode: int
    height: int
    width: int
    num_targets: int
    target_h: int
    target_w: int
    context_h: int
    context_w: int
    min_keep: int  # packed: fewest patches of a context; faithful: one less than the fewest
    keep: int  # context patches of every image, fixed: 0 measures the raw counts; unused in faithful and packed
    cap: int = 0  # packed: room for the contexts of the call
    union_cap: int = 0  # room for the unions of the call


class MaskArrays(NamedTuple):
    """Masks of B images with M targets of Kt patches each, on a grid of N patches: int16 unless noted.

    Patches are numbered row by row. A slot is a position in the image's own list. Lists and slots ascend. A field is
    None if the caller did not ask for it or the mode has no such list.
    """

    context: np.ndarray  # [B, Kc]; packed: [cap], image after image, then -1
    target: np.ndarray  # [B, M, Kt]
    counts: np.ndarray  # [B] int32, the length of each context before any cut
    offsets: np.ndarray | None = None  # [B + 1] int32, packed: where each context begins; none exceeds cap
    image_of: np.ndarray | None = None  # [cap] int32, packed: the image of each token, -1 after the last
    inverse: np.ndarray | None = None  # [B, N], slot of each patch in its image's context, else -1
    union: np.ndarray | None = None  # [union_cap], the patches of any target, image after image, then -1
    union_offsets: np.ndarray | None = None  # [B + 1] int32, where each union begins; none exceeds union_cap
    target_slot: np.ndarray | None = None  # [B, M, Kt], slot of each target patch in its image's union


def check(spec: MaskSpec, ids: np.ndarray) -> None:
    """Raise ValueError for the first property of `ids`, or field of `spec`, that the samplers cannot take."""
    if not isinstance(ids, np.ndarray):
        where = f"a {type(ids).__name__}" + (f" on {ids.device}" if hasattr(ids, "device") else "")
        raise ValueError(f"ids is {where}: pass a NumPy array")
    if ids.dtype != np.int64 or ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"ids is {ids.dtype} {list(ids.shape)}: pass int64 [B] with B >= 1")
    if not ids.flags.c_contiguous:
        raise ValueError(f"ids has stride {ids.strides[0]}: pass a contiguous array")
    if ids.min() < 0:
        raise ValueError(f"ids holds {ids.min()}: pass 0 to 2**63 - 1")

    height, width, room = spec.height, spec.width, int(spec.mode == Mode.FAITHFUL)
    patches, window = height * width, spec.context_h * spec.context_w
    limits: dict[str, tuple[float, float]] = {"seed": (0, 2**64 - 1), "step": (0, 2**32 - 1), "mode": (0, max(Mode))}
    limits |= {"height": (1, MAX_SIDE), "width": (1, MAX_SIDE), "num_targets": (1, MAX_TARGETS)}
    limits |= dict.fromkeys(("target_h", "context_h"), (1, height - room))
    limits |= dict.fromkeys(("target_w", "context_w"), (1, width - room))
    limits |= dict.fromkeys(("min_keep", "keep", "cap", "union_cap"), (0, 2**31 - 1))
    if spec.mode == Mode.FIXED:
        limits["keep"] = (0, window)
    elif spec.mode in (Mode.FAITHFUL, Mode.PACKED):
        limits["min_keep"] = (0, window - 1)
    else:  # the context is the complement of the targets, which leaves most fields one value
        parts, h, w = (3, height / 2, width / 2) if spec.mode == Mode.RASTERIZED else (1, height, width)
        limits |= {"num_targets": (parts, parts), "context_h": (h, h), "context_w": (w, w)}
        if spec.mode == Mode.RASTERIZED:
            limits |= {"target_h": (h, h), "target_w": (w, w)}
        if spec.mode == Mode.RANDOM:
            limits |= {"target_h": (1, 1), "target_w": (1, patches)}
        left = patches - parts * spec.target_h * spec.target_w
        limits["keep"] = (left, left)
    for name, (low, high) in limits.items():
        value = getattr(spec, name)
        if not low <= value <= high:
            raise ValueError(f"{name}={value} at {spec}: pass {low if low == high else f'{low} to {high}'}")


def _words(spec: MaskSpec, ids: np.ndarray, stream: int, address: int) -> np.ndarray:
    """Return the four words at one address for every sample: [B, 4]."""
    counter = np.empty((len(ids), 4), np.uint32)
    counter[:, 0] = ids & 0xFFFFFFFF
    counter[:, 1] = ids >> 32
    counter[:, 2:] = spec.step, stream << 28 | address
    return philox4x32(counter, (spec.seed & 0xFFFFFFFF, spec.seed >> 32))


def _below(words: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    return words.astype(np.int64) * n >> 32


def _corner(spec: MaskSpec, words: np.ndarray, h: int, w: int) -> np.ndarray:
    """Return the top-left corners [B, 2] of h x w blocks from their row and column words [B, 2]."""
    # The published code passes H - h to an exclusive randint: its blocks never touch the last row or column.
    room = 0 if spec.mode == Mode.FAITHFUL else 1
    rows = _below(words[:, 0], spec.height - h + room)
    return np.stack((rows, _below(words[:, 1], spec.width - w + room)), axis=-1)


def _inside(spec: MaskSpec, corner: np.ndarray, h: int, w: int) -> np.ndarray:
    """Return whether each patch lies in the block at `corner` [B, 2]: [B, H, W] bool."""
    row, col = np.arange(spec.height) - corner[:, :1], np.arange(spec.width) - corner[:, 1:]
    return ((row >= 0) & (row < h))[:, :, None] & ((col >= 0) & (col < w))[:, None, :]


def _listed(members: np.ndarray, size: int) -> np.ndarray:
    """Return the `size` patches of each image's `members` [B, N] bool, ascending: [B, size]."""
    return np.nonzero(members)[1].reshape(len(members), size)


def _place_target(spec: MaskSpec, ids: np.ndarray, attempt: int, m: int) -> np.ndarray:
    words = _words(spec, ids, TARGETS, attempt << 8 | m // 2)[:, 2 * (m % 2) : 2 * (m % 2) + 2]
    return _corner(spec, words, spec.target_h, spec.target_w)


def _target_patches(spec: MaskSpec, corners: np.ndarray) -> np.ndarray:
    """Return the patches of blocks at `corners` [B, M, 2]: [B, M, Kt]."""
    block = np.arange(spec.target_h)[:, None] * spec.width + np.arange(spec.target_w)
    return corners[..., :1] * spec.width + corners[..., 1:] + block.reshape(-1)


def _random_subset(spec: MaskSpec, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Draw `keep` of range(counts[b]) for each image by Floyd's algorithm (Bentley & Floyd, CACM 1987): [B, N] bool."""
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


def _multi_block(spec: MaskSpec, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the window outside the targets [B, N] bool, and the targets [B, M, Kt]: fixed, faithful, packed."""
    batch, blocks, faithful = len(ids), spec.num_targets, spec.mode == Mode.FAITHFUL
    least = {Mode.FIXED: spec.keep, Mode.FAITHFUL: spec.min_keep + 1, Mode.PACKED: spec.min_keep}[Mode(spec.mode)]
    corners = np.empty((batch, blocks, 2), np.int64)
    free = np.empty((batch, spec.height, spec.width), bool)
    pending = np.arange(batch)
    for attempt in range(TRIES_PER_REGION * blocks + 1 if faithful else MAX_ATTEMPTS):
        some = ids[pending]
        if attempt == 0 or not faithful:  # the published code redraws the window alone
            for m in range(blocks):
                corners[pending, m] = _place_target(spec, some, attempt, m)
        window = _corner(spec, _words(spec, some, CONTEXT, attempt << 8), spec.context_h, spec.context_w)
        left = _inside(spec, window, spec.context_h, spec.context_w)
        for m in range(blocks - attempt // TRIES_PER_REGION if faithful else blocks):
            left &= ~_inside(spec, corners[pending, m], spec.target_h, spec.target_w)
        free[pending] = left
        pending = pending[left.sum((1, 2)) < least]
        if len(pending) == 0:
            return free.reshape(batch, -1), _target_patches(spec, corners)
    raise RuntimeError(f"no context for sample {ids[pending[0]]} at {spec}")


def _ablation(spec: MaskSpec, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return contexts [B, N] bool and targets [B, M, Kt]: modes whose context is the complement of the targets."""
    patches = spec.height * spec.width
    if spec.mode == Mode.RASTERIZED:
        row, col = np.divmod(np.arange(patches), spec.width)
        quadrant = row // spec.target_h * 2 + col // spec.target_w
        members = np.argsort(quadrant, kind="stable").reshape(4, -1)
        chosen = _below(_words(spec, ids, CONTEXT, 0)[:, 0], 4)
        others = np.array([[q for q in range(4) if q != c] for c in range(4)])[chosen]
        return quadrant == chosen[:, None], members[others]
    if spec.mode == Mode.BLOCK:
        target = _target_patches(spec, _place_target(spec, ids, 0, 0)[:, None])
        kept = np.ones((len(ids), patches), bool)
        np.put_along_axis(kept, target[:, 0], False, axis=1)
        return kept, target
    kept = _random_subset(spec, ids, np.full(len(ids), patches))
    return kept, _listed(~kept, spec.target_w)[:, None]


def _pack(members: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List the patches in `members` [B, N] image after image [room], their images [room], and the offsets [B + 1]."""
    rows, patches = np.nonzero(members)
    listed, owner = np.full(room, -1), np.full(room, -1)
    listed[: len(patches)], owner[: len(patches)] = patches[:room], rows[:room]
    offsets = np.concatenate(([0], members.sum(1).cumsum()))
    return listed, owner, np.minimum(offsets, room)


def sample(spec: MaskSpec, ids: np.ndarray, *, inverse: bool = False, union: bool = False) -> MaskArrays:
    """Return the masks of one call for `ids` [B] int64; `inverse` and `union` ask for the fields of these names.

    Lists that exceed `cap` or `union_cap` lose their last entries. Target slots are lowered until
    union_offsets[b] + slot < union_cap, so that a read through the slots stays in bounds.

    Raises:
        RuntimeError: fixed or packed find no context of the least length in MAX_ATTEMPTS.
    """
    if spec.mode in (Mode.FIXED, Mode.FAITHFUL, Mode.PACKED):
        kept, target = _multi_block(spec, ids)
    else:
        kept, target = _ablation(spec, ids)
    counts = kept.sum(1)
    if spec.mode == Mode.FIXED:
        picked = _random_subset(spec, ids, counts)
        # Both sides of the indexing list the free patches of all images in the same row-major order.
        kept[kept] = picked[np.arange(kept.shape[1]) < counts[:, None]]
    elif spec.mode == Mode.FAITHFUL:
        kept &= kept.cumsum(1) <= counts.min()

    maps: dict[str, np.ndarray] = {}
    if spec.mode == Mode.PACKED:
        context, owner, offsets = _pack(kept, spec.cap)
        maps |= {"offsets": offsets.astype(np.int32), "image_of": owner.astype(np.int32)}
        kept &= kept.cumsum(1) <= np.diff(offsets)[:, None]
    else:
        context = _listed(kept, int(kept.sum(1).max()))
    if inverse:
        maps["inverse"] = np.where(kept, kept.cumsum(1) - 1, -1).astype(np.int16)
    if union:
        covered = np.zeros_like(kept)
        np.put_along_axis(covered, target.reshape(len(ids), -1), True, axis=1)
        listed, _, offsets = _pack(covered, spec.union_cap)
        slot = np.take_along_axis(covered.cumsum(1) - 1, target.reshape(len(ids), -1), axis=1)
        slot = np.minimum(slot, spec.union_cap - 1 - offsets[:-1, None]).reshape(target.shape)
        maps |= {"union": listed.astype(np.int16), "union_offsets": offsets.astype(np.int32)}
        maps["target_slot"] = slot.astype(np.int16)
    return MaskArrays(context.astype(np.int16), target.astype(np.int16), counts.astype(np.int32), **maps)
