"""Masks: inputs that decide a mask, its form in every mode, and the published statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cjepa_fast import config, ops
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.engine import cost
from cjepa_fast.engine.schedules import Length
from cjepa_fast.masks import MODES, Masks, MultiBlockSampler
from cjepa_fast.reference import masks as reference_masks
from cjepa_fast.reference.masks import MaskSpec, Mode
from masking import ABLATIONS, make

CUT = ("fixed", "faithful")  # the contexts are cut to one length


def coverage(index: torch.Tensor, side: int) -> np.ndarray:
    """Count how often each patch occurs in `index`: [side, side]."""
    return np.bincount(index.numpy().ravel(), minlength=side * side).reshape(side, side)


def cut(masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
    return masks.context, masks.target


def uncovered(target: torch.Tensor, patches: int) -> np.ndarray:
    """Return whether each patch is outside every target block: [B, patches] bool."""
    free = np.ones((len(target), patches), bool)
    np.put_along_axis(free, target.flatten(1).long().numpy(), False, axis=1)
    return free


def test_a_mask_depends_on_seed_step_and_id_alone() -> None:
    sampler, ids = make(seed=5), torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    for step in (3, 4):
        context, target = cut(sampler.sample(step, ids))  # large enough for several threads
        for rank in range(3):  # another process, another order, another split
            part = torch.arange(rank, len(ids), 3).flip(0)
            masks = make(seed=5).sample(step, ids[part].tolist())
            assert torch.equal(masks.context, context[part])
            assert torch.equal(masks.target, target[part])
    base = sampler.sample(3, range(8))
    for step, ids in ((4, range(8)), (3, range(8, 16)), (3, range(2**32, 2**32 + 8))):
        other = sampler.sample(step, ids)
        assert not torch.equal(base.target[:, :, 0], other.target[:, :, 0])
    assert not torch.equal(base.target[:, :, 0], make(seed=6).sample(3, range(8)).target[:, :, 0])


def test_faithful_contexts_differ_between_batches_only_by_their_length() -> None:
    sampler = make("faithful", seed=5)
    context, target = cut(sampler.sample(2, range(128)))
    for sample_id in (0, 17, 127):
        alone = sampler.sample(2, [sample_id])
        assert torch.equal(alone.target[0], target[sample_id])
        assert torch.equal(alone.context[0, : context.shape[1]], context[sample_id])


def test_sample_ids_may_be_any_integer_sequence() -> None:
    sampler, expected = make(), make().sample(0, [3, 1, 2]).context
    for ids in ((3, 1, 2), np.array([3, 1, 2], np.uint16), torch.tensor([3, 1, 2], dtype=torch.int32)):
        assert torch.equal(sampler.sample(0, ids).context, expected)
    strided = np.array([3, 0, 1, 0, 2, 0])[::2]
    assert torch.equal(sampler.sample(0, strided).context, expected)


@pytest.mark.parametrize(("grid", "min_keep"), [(14, 10), (6, 4), (8, 4), ((8, 12), 4), (28, 10)])
@pytest.mark.parametrize("mode", CUT)
def test_indices_ascend_and_targets_are_blocks(mode: str, grid: int | tuple[int, int], min_keep: int) -> None:
    sampler = make(mode, grid, min_keep=1 if mode == "faithful" else min_keep)
    height, width = sampler.grid
    shapes = {(keep, area) for _, keep, area in sampler.shapes()}
    for step in range(40):
        context, target = cut(sampler.sample(step, range(50)))
        (h, w), _ = sampler.block_sizes(step)
        assert context.dtype == target.dtype == torch.int16
        assert context.shape[0] == 50 and target.shape == (50, 4, h * w)
        assert (context.diff(dim=1) > 0).all() and (target.diff(dim=2) > 0).all()
        assert context.min() >= 0 and context.max() < height * width
        rows, cols = target // width, target % width
        assert (rows.amax(2) - rows.amin(2) == h - 1).all() and (cols.amax(2) - cols.amin(2) == w - 1).all()
        assert np.take_along_axis(uncovered(target, height * width), context.long().numpy(), 1).all()
        if mode == "fixed":
            assert (context.shape[1], h * w) in shapes and context.shape[1] >= min_keep
    assert sum(p for p, _, _ in sampler.shapes()) == pytest.approx(1, abs=1e-12)


# Figures of the published collator, simulated with its own class: the probabilities of the block sizes, the coverage of
# each grid row, and below the lengths at a batch of 128 per GPU.
TARGET_SIZES = {
    14: {(5, 6): 0.26, (6, 5): 0.13, (6, 6): 0.22, (7, 5): 0.36, (8, 5): 0.03},
    16: {(5, 7): 0.05, (6, 6): 0.02, (6, 7): 0.28, (7, 6): 0.29, (8, 6): 0.30, (9, 6): 0.07},
}
RAW_ROWS = (0.75, 0.60, 0.48, 0.38, 0.31, 0.27, 0.25, 0.27, 0.31, 0.38, 0.48, 0.60, 0.75, 0)
CUT_ROWS = (0.75, 0.60, 0.48, 0.37, 0.26, 0.21, 0.18, 0.18, 0.18, 0.18, 0.13, 0.06, 0.02, 0)


@pytest.mark.parametrize("side", [14, 16])
def test_faithful_block_sizes(side: int) -> None:
    sampler, steps = make("faithful", side, seed=1), 4000
    sizes = [sampler.block_sizes(step) for step in range(steps)]
    assert {context for _, context in sizes} == {(side - 1, side - 1)}
    seen = {size: sum(size == target for target, _ in sizes) / steps for size in TARGET_SIZES[side]}
    assert sum(seen.values()) == pytest.approx(1)
    for size, p in TARGET_SIZES[side].items():  # five standard errors, and half a unit of the rounded figure
        assert abs(seen[size] - p) < 5 * math.sqrt(p * (1 - p) / steps) + 0.005
    exact = {area: p for p, keep, area in sampler.shapes() if keep is None}
    for area, p in exact.items():
        assert p == pytest.approx(
            sum(q for size, q in TARGET_SIZES[side].items() if math.prod(size) == area), abs=0.011
        )


def test_faithful_mean_tokens() -> None:
    # Published simulations: 50.2 and 50.9 at B = 128, 47.1 and 47.6 at 256, 59.7 at 16, 81.7 raw; their own
    # sampling error is about 0.7 (sd 7.5 over 100 or more steps).
    sampler = make("faithful")
    for batch_size, context in ((1, 81.7), (16, 59.7), (128, 50.2), (256, 47.1)):
        mean_context, mean_target = sampler.expected_tokens(batch_size)
        assert mean_context == pytest.approx(context, abs=1.5)
        assert mean_target == pytest.approx(33.39, abs=0.01)
    finer = make("faithful", 16)
    assert finer.expected_tokens()[1] == pytest.approx(44.23, abs=0.01)
    for batch_size, context in ((1, 109.8), (128, 68.8), (256, 64.8)):  # 68.8: a training log prints 68.8 at 112
        assert finer.expected_tokens(batch_size)[0] == pytest.approx(context, abs=2)
    big = make("faithful", 28)
    assert big.expected_tokens()[1] == pytest.approx(136.25, abs=0.02)
    for batch_size, context in ((1, 356), (16, 269)):  # the means of two simulations, 2 % apart
        assert big.expected_tokens(batch_size)[0] == pytest.approx(context, rel=0.02)
    targets, contexts = zip(*(big.block_sizes(step) for step in range(1500)), strict=True)
    assert len(set(targets)) == 9 and len({math.prod(size) for size in targets}) == 8
    assert set(contexts) == {(26, 26), (27, 27)}
    assert contexts.count((26, 26)) / 1500 == pytest.approx(0.31, abs=0.06)  # five standard errors


def test_faithful_coverage_and_lengths_at_batch_128() -> None:
    sampler, steps = make("faithful", seed=2), 400
    context_rows, target_cover, raw_rows, lengths, raw = (
        np.zeros(14),
        np.zeros((14, 14)),
        np.zeros(14),
        [],
        [],
    )
    for step in range(steps):
        context, target = cut(sampler.sample(step, range(step * 128, step * 128 + 128)))
        lengths.append(context.shape[1])
        context_rows += coverage(context, 14).sum(1)
        target_cover += coverage(target, 14)
        for sample_id in range(5):  # one image alone is not cut
            alone = sampler.sample(step, [step * 128 + sample_id]).context
            raw_rows += coverage(alone, 14).sum(1)
            raw.append(alone.shape[1])
    assert target_cover[-1].sum() == target_cover[:, -1].sum() == 0
    assert (target_cover[:-1, :-1] > 0).all()
    # The sd over steps is below 0.07 for every row (measured): 0.02 is five standard errors and the rounding.
    np.testing.assert_allclose(context_rows / (steps * 128 * 14), CUT_ROWS, atol=0.02)
    np.testing.assert_allclose(raw_rows / (steps * 5 * 14), RAW_ROWS, atol=0.03)
    assert np.mean(lengths) == pytest.approx(50.2, abs=2.0)
    assert np.mean(raw) == pytest.approx(81.7, abs=2.0)


def test_faithful_drops_targets_when_the_context_stays_too_short() -> None:
    # The 13x13 window cannot move, so redrawing never helps: the last targets are dropped one by one.
    sampler = make("faithful", min_keep=50, target_scale=(0.5, 0.5))
    dropped = set()
    for step in range(8):
        for sample_id in range(16):
            context, target = cut(sampler.sample(step, [sample_id]))
            window = np.zeros((14, 14), bool)
            window[:13, :13] = True
            for respected in (4, 3, 2, 1, 0):
                free = window.ravel() & uncovered(target[:, :respected].flatten(1)[:, None], 196)[0]
                if free.sum() > 50:
                    break
            dropped.add(4 - respected)
            np.testing.assert_array_equal(context[0].numpy(), np.flatnonzero(free))
    assert len(dropped) > 1


def test_fixed_has_few_shapes_near_the_published_mean() -> None:
    shapes = make().shapes()
    assert len(shapes) == 8 and {area for _, _, area in shapes} == {24, 25, 28, 30, 35, 36, 40, 42}
    context, target = make().expected_tokens()
    assert context == pytest.approx(50, abs=2)  # batch minimum at B = 128, and the paper's context ratio of 0.25
    assert target == pytest.approx(33.8, abs=0.1)
    assert [(keep, area) for _, keep, area in make(grid=6, min_keep=4).shapes()] == [
        (10, 4),
        (5, 6),
        (4, 9),
    ]


def test_fixed_rejects_under_one_percent() -> None:
    """Kc is the 1/128 quantile at the smallest window, checked with other ids than those of the simulation."""
    keep = {area: keep or 0 for _, keep, area in make().shapes()}
    for size in ((5, 6), (7, 5), (6, 6), (6, 7)):
        spec = MaskSpec(9, 0, Mode.FIXED, 14, 14, 4, *size, 13, 13, 10, 0)
        counts = reference_masks.sample(spec, np.arange(8000))[2]
        kc = keep[math.prod(size)]
        assert (counts < kc).mean() < 0.0125 and (counts < kc + 3).mean() > 1 / 128


def test_fixed_reaches_every_patch_symmetrically() -> None:
    sampler = make(seed=3)
    seen = np.zeros((2, 14, 14))
    for step in range(100):
        for total, index in zip(seen, cut(sampler.sample(step, range(2500))), strict=True):
            total += coverage(index, 14)
    assert (seen > 0).all()
    # 250,000 images: the rarest line, an edge covered by targets, has a standard error of 0.4 %.
    for cover in seen:
        for lines in (cover.sum(0), cover.sum(1)):
            np.testing.assert_allclose(lines, lines[::-1], rtol=0.02)


def test_fixed_subset_favours_no_position() -> None:
    """Each patch of the untrimmed context is kept with probability Kc / its length, wherever it lies."""
    sampler, ids = make(seed=4), np.arange(3000)
    surplus, variance = np.zeros(196), np.zeros(196)
    for step in range(25):
        context = sampler.sample(step, ids).context
        whole = untrimmed(sampler, step, ids)
        assert whole.image_of is not None
        filled = whole.context >= 0
        p = context.shape[1] / whole.counts[whole.image_of[filled]]
        expected = np.bincount(whole.context[filled], p, minlength=196)
        surplus += coverage(context, 14).ravel() - expected
        variance += np.bincount(whole.context[filled], p * (1 - p), minlength=196)
    z = surplus / np.sqrt(variance)
    assert np.abs(z).max() < 5
    assert 0.6 < (z**2).mean() < 1.5  # 196 nearly independent squares: standard error 0.1


def test_fixed_subsets_are_equally_likely() -> None:
    spec = MaskSpec(11, 0, Mode.FIXED, 14, 14, 4, 6, 6, 14, 14, 10, keep=3)
    picked = reference_masks._random_subset(spec, np.arange(42000), np.full(42000, 7))
    assert (picked.sum(1) == 3).all() and not picked[:, 7:].any()
    counts = np.unique(picked[:, :7] @ (1 << np.arange(7)), return_counts=True)[1]
    assert len(counts) == 35  # 7 choose 3, each 1200 times
    assert ((counts - 1200) ** 2 / 1200).sum() < 34 + 5 * math.sqrt(2 * 34)


def untrimmed(sampler: MultiBlockSampler, step: int, ids: np.ndarray) -> reference_masks.MaskArrays:
    """Return the contexts of a fixed sampler before the cut: packed draws the same blocks if its `min_keep` is Kc."""
    spec = sampler.spec(step, len(ids))
    spec = spec._replace(mode=Mode.PACKED, min_keep=spec.keep, cap=len(ids) * spec.context_h * spec.context_w)
    return ops.sample_masks(spec, ids, impl=sampler.impl)


@pytest.mark.parametrize("grid", [14, 16])
def test_packed_keeps_exactly_what_fixed_cuts(grid: int) -> None:
    sampler, ids = make(grid=grid, min_keep=4, seed=8), np.arange(200)
    windows = set()
    for step in range(12):
        spec = sampler.spec(step, len(ids))
        short, whole = ops.sample_masks(spec, ids, impl=sampler.impl), untrimmed(sampler, step, ids)
        assert whole.offsets is not None and whole.image_of is not None
        np.testing.assert_array_equal(whole.target, short.target)
        np.testing.assert_array_equal(whole.counts, short.counts)
        np.testing.assert_array_equal(np.diff(whole.offsets), whole.counts)
        total = whole.offsets[-1]
        np.testing.assert_array_equal(whole.image_of[:total], np.repeat(ids, whole.counts))
        assert (whole.image_of[total:] == -1).all() and (whole.context[total:] == -1).all()
        free = uncovered(torch.from_numpy(whole.target), math.prod(sampler.grid))
        windows.add((spec.context_h, spec.context_w))
        for image, begin in enumerate(whole.offsets[:-1]):
            context = whole.context[begin : whole.offsets[image + 1]]
            assert (np.diff(context) > 0).all() and np.isin(short.context[image], context).all()
            assert free[image, context].all()
            if (spec.context_h, spec.context_w) == sampler.grid:
                np.testing.assert_array_equal(context, np.flatnonzero(free[image]))
    assert sampler.grid in windows and len(windows) > 1


@pytest.mark.parametrize(
    ("grid", "batch", "full"),
    # of contexts, five deviations above the mean, and of unions, eight
    [(14, 128, (0.935, 0.9)), (14, 2048, (0.98, 0.97)), (16, 16, (0.84, 0.765)), (14, 1, (0, 0))],
)
def test_rooms_hold_every_batch_and_little_more(grid: int, batch: int, full: tuple[float, float]) -> None:
    sampler, rooms, filled = make("packed", grid, seed=1), set(), []
    for step in range(100):
        masks = sampler.sample(step, range(step * batch, (step + 1) * batch), union=True)
        assert masks.offsets is not None and masks.union is not None and masks.union_offsets is not None
        shares = []
        for listed, offsets in ((masks.context, masks.offsets), (masks.union, masks.union_offsets)):
            end = int(offsets[-1])
            assert (listed[:end] >= 0).all() and (listed[end:] == -1).all()
            assert len(listed) <= batch * grid * grid and (batch == 1 or len(listed) % 16 == 0)
            shares.append(end / len(listed))
        target, window = sampler.block_sizes(step)
        rooms.add((math.prod(target), window, len(masks.context), len(masks.union)))
        filled.append(shares)
    assert len(rooms) == len({room[:2] for room in rooms})  # one room for each block size
    assert np.max(filled) < 1 and (np.mean(filled, axis=0) > np.array(full) - 0.01).all()


def test_rooms_depend_on_block_size_and_batch_alone() -> None:
    """Earlier steps and batches, which differ after a restart, have no influence."""
    forwards, backwards = (make("packed", seed=1) for _ in range(2))
    calls = [(step, batch) for step in range(40) for batch in (16, 128)]
    specs = {call: forwards.spec(*call, union=True) for call in calls}
    assert specs == {call: backwards.spec(*call, union=True) for call in reversed(calls)}


@pytest.mark.parametrize("impl", ["native", "numpy"])
def test_overfull_lists_lose_their_last_entries(impl: str) -> None:
    """No read through the maps leaves a list, even with far too little room."""
    ids = np.arange(40)
    spec = make("packed").spec(0, len(ids), union=True)
    whole = ops.sample_masks(spec, ids, impl=impl, inverse=True, union=True)
    small = spec._replace(cap=1500, union_cap=1201)
    part = ops.sample_masks(small, ids, impl=impl, inverse=True, union=True)
    assert whole.offsets is not None and whole.union_offsets is not None and whole.inverse is not None
    assert part.union_offsets is not None and part.target_slot is not None and whole.target_slot is not None
    assert whole.offsets[-1] > 1500 and whole.union_offsets[-1] > 1201
    np.testing.assert_array_equal(part.context, whole.context[:1500])
    np.testing.assert_array_equal(part.offsets, np.minimum(whole.offsets, 1500))
    np.testing.assert_array_equal(part.counts, whole.counts)
    there = (whole.inverse >= 0) & (whole.offsets[:-1, None] + whole.inverse < 1500)
    np.testing.assert_array_equal(part.inverse, np.where(there, whole.inverse, -1))
    np.testing.assert_array_equal(part.union_offsets, np.minimum(whole.union_offsets, 1201))
    rows = part.union_offsets[:-1, None, None] + part.target_slot
    expected = whole.union_offsets[:-1, None, None] + whole.target_slot
    np.testing.assert_array_equal(rows, np.minimum(expected, 1200))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", [14, (8, 12)])
def test_maps_lead_back_to_the_patches(grid: int | tuple[int, int], mode: str) -> None:
    sampler = make(mode, grid, min_keep=3, seed=2)
    for step in range(4):
        masks = sampler.sample(step, range(70), inverse=True, union=True)
        assert masks.inverse is not None and masks.union is not None
        assert masks.union_offsets is not None and masks.target_slot is not None
        assert {t.dtype for t in (masks.inverse, masks.union, masks.target_slot)} == {torch.int16}
        plain = sampler.sample(step, range(70))
        assert torch.equal(plain.context, masks.context) and torch.equal(plain.target, masks.target)
        assert plain.inverse is plain.union is plain.union_offsets is plain.target_slot is None
        assert (plain.offsets is None) == (mode != "packed")
        for image in range(70):
            context = (
                masks.context[image] if masks.offsets is None else masks.context[slice(*masks.offsets[image:][:2])]
            )
            slots = masks.inverse[image, context.long()]
            assert torch.equal(slots, torch.arange(len(context), dtype=torch.int16))
            assert (masks.inverse[image] >= 0).sum() == len(context)
            listed = masks.union[slice(*masks.union_offsets[image:][:2])]
            assert torch.equal(listed, masks.target[image].unique())
            assert torch.equal(listed[masks.target_slot[image].long()], masks.target[image])


@pytest.mark.parametrize("mode", MODES)
def test_trimmed(mode: str) -> None:
    """Trimmed lists hold all entries in the same memory, have padding under a 32nd of the list, and few lengths."""
    lengths = set()
    for step in range(200):
        masks = make(mode).sample(step, range(16), union=True)
        trimmed = masks.trimmed()
        lists = [(masks.union, trimmed.union, masks.union_offsets)]
        if mode == "packed":
            lists += [(getattr(masks, name), getattr(trimmed, name), masks.offsets) for name in ("context", "image_of")]
        else:
            assert trimmed.context is masks.context and trimmed.image_of is None
        for whole, part, offsets in lists:
            assert whole is not None and part is not None and offsets is not None
            assert part.data_ptr() == whole.data_ptr()
            assert 0 <= len(part) - int(offsets[-1]) <= len(whole) / 32
        assert trimmed.target is masks.target and trimmed.target_slot is masks.target_slot
        lengths.add((len(whole), len(part)))
    assert len(lengths) <= 60, lengths


@pytest.mark.parametrize(
    ("device", "keep_shapes", "shorter"), [("cpu", False, True), ("cpu", True, False), ("meta", False, False)]
)
def test_placed_masks_lose_padding_only_on_a_cpu_without_compiled_shapes(
    device: str, keep_shapes: bool, shorter: bool
) -> None:
    masks = make("packed").sample(0, range(16))
    masks = masks._make(None if mask is None else mask.to(device) for mask in masks)
    placed = masks.placed(torch.device(device), keep_shapes=keep_shapes)
    assert (len(placed.context) < len(masks.context)) == shorter
    assert placed.target is masks.target


def test_mean_size_of_the_union() -> None:
    """Published simulations give 87.3, 115.3 and 355 patches, with an error from the block sizes that they drew."""
    for side, union in ((14, 87.3), (16, 115.3), (28, 355)):
        sampler, total = make("faithful", side), 0
        for step in range(300):
            offsets = sampler.sample(step, range(16), union=True).union_offsets
            assert offsets is not None
            total += int(offsets[-1])
        assert total / (300 * 16) == pytest.approx(union, rel=0.02)


@pytest.mark.parametrize("grid", [14, 16, (8, 12)])
@pytest.mark.parametrize("mode", ABLATIONS)
def test_ablations_divide_the_grid(mode: str, grid: int | tuple[int, int]) -> None:
    sampler = make(mode, grid, seed=4, min_keep=1)
    height, width = sampler.grid
    shapes = {(keep, area) for _, keep, area in sampler.shapes()}
    assert sum(p for p, _, _ in sampler.shapes()) == pytest.approx(1)
    for step in range(20):
        context, target = cut(sampler.sample(step, range(60)))
        assert (context.shape[1], target.shape[2]) in shapes
        every = torch.cat((context, target.flatten(1)), dim=1).sort(dim=1).values
        assert torch.equal(every, torch.arange(height * width, dtype=torch.int16).expand(60, -1))
        assert (context.diff(dim=1) > 0).all() and (target.diff(dim=2) > 0).all()
    if mode == "rasterized":
        assert shapes == {(height * width // 4, height * width // 4)}
        parts = torch.cat((context[:, None], target), dim=1)
        rows, cols = parts // width, parts % width
        assert (rows.amax(2) - rows.amin(2) == height // 2 - 1).all()
        assert (cols.amax(2) - cols.amin(2) == width // 2 - 1).all()
        assert (target[:, :, 0].diff(dim=1) > 0).all()
    if mode == "random":
        assert shapes == {(height * width - round(0.6 * height * width), round(0.6 * height * width))}
    if mode == "block":
        (h, w), window = sampler.block_sizes(step)
        assert window == sampler.grid and target.shape == (60, 1, h * w)
        rows, cols = target // width, target % width
        assert (rows.amax(2) - rows.amin(2) == h - 1).all() and (cols.amax(2) - cols.amin(2) == w - 1).all()


def test_ablations_favour_no_place() -> None:
    images = 40000
    context, _ = cut(make("rasterized").sample(0, range(images)))
    quadrants = np.unique(context[:, 0].numpy(), return_counts=True)[1]
    assert len(quadrants) == 4 and ((quadrants - images / 4) ** 2).sum() / (images / 4) < 3 + 5 * math.sqrt(6)

    context, _ = cut(make("random").sample(0, range(images)))
    p = 78 / 196
    z = (coverage(context, 14) - images * p) / math.sqrt(images * p * (1 - p))
    assert np.abs(z).max() < 5 and 0.6 < (z**2).mean() < 1.5

    sampler = make("block")
    (h, w), _ = sampler.block_sizes(0)
    corners = np.unique(sampler.sample(0, range(images)).target[:, 0, 0].numpy(), return_counts=True)[1]
    places = (15 - h) * (15 - w)
    expected = images / places
    assert len(corners) == places
    assert ((corners - expected) ** 2).sum() / expected < places - 1 + 5 * math.sqrt(2 * places)


@pytest.mark.parametrize("mode", MODES)
def test_expected_tokens_and_cost_of_every_mode(mode: str) -> None:
    sampler, seen = make(mode, seed=6), []
    for step in range(400):
        spec = sampler.spec(step, 32)
        masks = sampler.sample(step, range(32))
        context = masks.context.shape[1] if masks.offsets is None else int(masks.offsets[-1]) / 32
        seen.append((context, spec.target_h * spec.target_w))
    tokens = sampler.expected_tokens(32)
    assert tokens == pytest.approx(np.mean(seen, axis=0), rel=0.02)
    c = config.replace(PRESETS["cifar10_tiny"], {"mask.mode": mode, "mask.num_targets": sampler.num_targets})
    method = "ijepa" if sampler.num_targets == 1 else c.method  # of one target VICReg has no pair
    c = config.replace(c, {"optim.batch_size": 4, "method": method})
    plan = cost.plan_memory(c, config.World(), tokens, None, measure=True)
    report = cost.report(c, config.World(), Length(100, 10, 1), plan, tokens)
    assert f"{tokens[0]:.1f} in the context" in report and f"{sampler.num_targets} x {tokens[1]:.1f}" in report


def test_context_keep_replaces_the_quantile() -> None:
    sampler = make(grid=8, min_keep=4, context_keep=15)
    for step in range(20):
        masks = sampler.sample(step, range(64))
        assert masks.context.shape == (64, 15)
        for context, target in zip(masks.context, masks.target, strict=True):
            assert not set(context.tolist()) & set(target.flatten().tolist())
    assert {keep for _, keep, _ in sampler.shapes()} == {15}
