from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cjepa_fast import native, reference_masks
from cjepa_fast.errors import UserError
from cjepa_fast.masks import MultiBlockSampler
from cjepa_fast.philox import philox4x32
from cjepa_fast.reference_masks import MaskSpec

MODES = ("fixed", "faithful")
RANDOM123 = (  # Random123's known answers for philox4x32-10: counter, key, output
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.fixture(scope="module")
def library() -> None:
    if (reason := native.why_unavailable()) is not None:
        pytest.skip(f"the C++ sampler is not available: {reason}")


def coverage(index: torch.Tensor, side: int) -> np.ndarray:
    """How often each patch occurs in `index`: [side, side]."""
    return np.bincount(index.numpy().ravel(), minlength=side * side).reshape(side, side)


def uncovered(target: torch.Tensor, patches: int) -> np.ndarray:
    """Patches outside every target block: [B, patches] bool."""
    free = np.ones((len(target), patches), bool)
    np.put_along_axis(free, target.flatten(1).numpy(), False, axis=1)
    return free


# --- the generator, and the two implementations


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123)
def test_philox_known_answers(
    library: None, counter: tuple[int, int, int, int], key: int, words: tuple[int, ...]
) -> None:
    assert native.philox4x32(counter, key) == words
    assert tuple(philox4x32(np.array(counter, np.uint32), (key & 0xFFFFFFFF, key >> 32))) == words


@st.composite
def specs(draw: st.DrawFn) -> MaskSpec:
    """Any spec the library accepts, also ones that need many redraws or never succeed."""
    faithful = draw(st.booleans())
    height, width = draw(st.sampled_from(((6, 6), (7, 7), (8, 8), (14, 14), (16, 16), (28, 28), (8, 12), (64, 64))))
    side_h = st.integers(1, height - faithful)
    side_w = st.integers(1, width - faithful)
    context_h, context_w = draw(side_h), draw(side_w)
    area = context_h * context_w
    return MaskSpec(
        seed=draw(st.integers(0, 2**64 - 1)),
        step=draw(st.integers(0, 2**32 - 1)),
        faithful=faithful,
        height=height,
        width=width,
        num_targets=draw(st.integers(1, 7)),
        target_h=draw(side_h),
        target_w=draw(side_w),
        context_h=context_h,
        context_w=context_w,
        min_keep=draw(st.integers(0, area - 1)),
        keep=draw(st.integers(0, area)),
    )


@settings(max_examples=300, deadline=None)
@given(spec=specs(), ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9), threads=st.integers(1, 4))
def test_native_equals_numpy_bit_for_bit(library: None, spec: MaskSpec, ids: list[int], threads: int) -> None:
    array = np.array(ids, np.int64)
    try:
        expected = reference_masks.sample(spec, array)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="no context"):
            native.sample_masks(spec, array, threads)
        return
    for ours, theirs in zip(native.sample_masks(spec, array, threads), expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", [6, 7, 8, 14, 16, 28, (8, 12)])
def test_samplers_agree(library: None, grid: int | tuple[int, int], mode: str) -> None:
    fast, plain = (MultiBlockSampler(grid, mode, 2**40 + 3, min_keep=3, impl=impl) for impl in ("native", "numpy"))
    assert fast.shapes() == plain.shapes()
    for step in (0, 1, 77, 2**32 - 1):
        for ids in (np.arange(64), 2**62 - np.arange(5)):
            for ours, theirs in zip(fast.sample(step, ids), plain.sample(step, ids), strict=True):
                assert torch.equal(ours, theirs)


def test_the_library_refuses_an_impossible_spec(library: None) -> None:
    too_wide = MaskSpec(0, 0, True, 8, 8, 4, 3, 8, 7, 7, 4, 0)
    with pytest.raises(RuntimeError, match="impossible"):
        native.sample_masks(too_wide, np.arange(2))


# --- what a mask depends on


def test_a_mask_depends_on_seed_step_and_id_alone() -> None:
    sampler, ids = MultiBlockSampler(seed=5), torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    for step in (3, 4):
        context, target = sampler.sample(step, ids)  # large enough for several threads
        for rank in range(3):  # another process, another order, another split
            part = torch.arange(rank, len(ids), 3).flip(0)
            masks = MultiBlockSampler(seed=5).sample(step, ids[part].tolist())
            assert torch.equal(masks.context, context[part])
            assert torch.equal(masks.target, target[part])
    base = sampler.sample(3, range(8))
    for step, ids in ((4, range(8)), (3, range(8, 16)), (3, range(2**32, 2**32 + 8))):
        other = sampler.sample(step, ids)
        assert not torch.equal(base.target[:, :, 0], other.target[:, :, 0])
    assert not torch.equal(base.target[:, :, 0], MultiBlockSampler(seed=6).sample(3, range(8)).target[:, :, 0])


def test_faithful_contexts_differ_between_batches_only_by_their_length() -> None:
    sampler = MultiBlockSampler(mode="faithful", seed=5)
    context, target = sampler.sample(2, range(128))
    for sample_id in (0, 17, 127):
        alone = sampler.sample(2, [sample_id])
        assert torch.equal(alone.target[0], target[sample_id])
        assert torch.equal(alone.context[0, : context.shape[1]], context[sample_id])


def test_sample_ids_may_be_any_integer_sequence() -> None:
    sampler, expected = MultiBlockSampler(), MultiBlockSampler().sample(0, [3, 1, 2]).context
    for ids in ((3, 1, 2), np.array([3, 1, 2], np.uint16), torch.tensor([3, 1, 2], dtype=torch.int32)):
        assert torch.equal(sampler.sample(0, ids).context, expected)
    strided = np.array([3, 0, 1, 0, 2, 0])[::2]
    assert torch.equal(sampler.sample(0, strided).context, expected)


# --- both modes: the form of a mask


@pytest.mark.parametrize(("grid", "min_keep"), [(14, 10), (6, 4), (8, 4), ((8, 12), 4), (28, 10)])
@pytest.mark.parametrize("mode", MODES)
def test_indices_ascend_and_targets_are_blocks(mode: str, grid: int | tuple[int, int], min_keep: int) -> None:
    sampler = MultiBlockSampler(grid, mode, min_keep=1 if mode == "faithful" else min_keep)
    height, width = sampler.grid
    shapes = {(keep, area) for _, keep, area in sampler.shapes()}
    for step in range(40):
        context, target = sampler.sample(step, range(50))
        (h, w), _ = sampler.block_sizes(step)
        assert context.dtype == target.dtype == torch.int64
        assert context.shape[0] == 50 and target.shape == (50, 4, h * w)
        assert (context.diff(dim=1) > 0).all() and (target.diff(dim=2) > 0).all()
        assert context.min() >= 0 and context.max() < height * width
        rows, cols = target // width, target % width
        assert (rows.amax(2) - rows.amin(2) == h - 1).all() and (cols.amax(2) - cols.amin(2) == w - 1).all()
        assert np.take_along_axis(uncovered(target, height * width), context.numpy(), 1).all()
        if mode == "fixed":
            assert (context.shape[1], h * w) in shapes and context.shape[1] >= min_keep
    assert sum(p for p, _, _ in sampler.shapes()) == pytest.approx(1, abs=1e-12)


# --- faithful: the figures of the published collator. Simulated with its own class: the probabilities of the
# block sizes, the coverage of each row, and the lengths at a batch of 128 per GPU.

TARGET_SIZES = {
    14: {(5, 6): 0.26, (6, 5): 0.13, (6, 6): 0.22, (7, 5): 0.36, (8, 5): 0.03},
    16: {(5, 7): 0.05, (6, 6): 0.02, (6, 7): 0.28, (7, 6): 0.29, (8, 6): 0.30, (9, 6): 0.07},
}
RAW_ROWS = (0.75, 0.60, 0.48, 0.38, 0.31, 0.27, 0.25, 0.27, 0.31, 0.38, 0.48, 0.60, 0.75, 0)
CUT_ROWS = (0.75, 0.60, 0.48, 0.37, 0.26, 0.21, 0.18, 0.18, 0.18, 0.18, 0.13, 0.06, 0.02, 0)


@pytest.mark.parametrize("side", [14, 16])
def test_faithful_block_sizes(side: int) -> None:
    sampler, steps = MultiBlockSampler(side, "faithful", seed=1), 4000
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
    sampler = MultiBlockSampler(14, "faithful")
    for batch_size, context in ((1, 81.7), (16, 59.7), (128, 50.2), (256, 47.1)):
        mean_context, mean_target = sampler.expected_tokens(batch_size)
        assert mean_context == pytest.approx(context, abs=1.5)
        assert mean_target == pytest.approx(33.39, abs=0.01)
    assert MultiBlockSampler(16, "faithful").expected_tokens()[1] == pytest.approx(44.23, abs=0.01)
    big = MultiBlockSampler(28, "faithful")
    assert big.expected_tokens()[1] == pytest.approx(136.25, abs=0.02)
    targets, contexts = zip(*(big.block_sizes(step) for step in range(1500)), strict=True)
    assert len(set(targets)) == 9 and len({math.prod(size) for size in targets}) == 8
    assert set(contexts) == {(26, 26), (27, 27)}
    assert contexts.count((26, 26)) / 1500 == pytest.approx(0.31, abs=0.06)  # five standard errors


def test_faithful_coverage_and_lengths_at_batch_128() -> None:
    sampler, steps = MultiBlockSampler(14, "faithful", seed=2), 400
    context_rows, target_cover, raw_rows, lengths, raw = (
        np.zeros(14),
        np.zeros((14, 14)),
        np.zeros(14),
        [],
        [],
    )
    for step in range(steps):
        context, target = sampler.sample(step, range(step * 128, step * 128 + 128))
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
    sampler = MultiBlockSampler(14, "faithful", min_keep=50, target_scale=(0.5, 0.5))
    dropped = set()
    for step in range(8):
        for sample_id in range(16):
            context, target = sampler.sample(step, [sample_id])
            window = np.zeros((14, 14), bool)
            window[:13, :13] = True
            for respected in (4, 3, 2, 1, 0):
                free = window.ravel() & uncovered(target[:, :respected].flatten(1)[:, None], 196)[0]
                if free.sum() > 50:
                    break
            dropped.add(4 - respected)
            np.testing.assert_array_equal(context[0].numpy(), np.flatnonzero(free))
    assert len(dropped) > 1


# --- fixed


def test_fixed_has_few_shapes_near_the_published_mean() -> None:
    shapes = MultiBlockSampler(14).shapes()
    assert len(shapes) == 8 and {area for _, _, area in shapes} == {24, 25, 28, 30, 35, 36, 40, 42}
    context, target = MultiBlockSampler(14).expected_tokens()
    assert context == pytest.approx(50, abs=2)  # batch minimum at B = 128, and the paper's context ratio of 0.25
    assert target == pytest.approx(33.8, abs=0.1)
    assert [(keep, area) for _, keep, area in MultiBlockSampler(6, min_keep=4).shapes()] == [
        (10, 4),
        (5, 6),
        (4, 9),
    ]


def test_fixed_rejects_under_one_percent() -> None:
    """Kc is the 1/128 quantile at the smallest window, checked with ids that did not decide it."""
    keep = {area: keep or 0 for _, keep, area in MultiBlockSampler(14).shapes()}
    for size in ((5, 6), (7, 5), (6, 6), (6, 7)):
        spec = MaskSpec(9, 0, False, 14, 14, 4, *size, 13, 13, 10, 0)
        counts = reference_masks.sample(spec, np.arange(8000))[2]
        kc = keep[math.prod(size)]
        assert (counts < kc).mean() < 0.0125 and (counts < kc + 3).mean() > 1 / 128


def test_fixed_reaches_every_patch_symmetrically() -> None:
    sampler = MultiBlockSampler(14, seed=3)
    seen = np.zeros((2, 14, 14))
    for step in range(100):
        for total, index in zip(seen, sampler.sample(step, range(2500)), strict=True):
            total += coverage(index, 14)
    assert (seen > 0).all()
    # 250,000 images: the rarest line, an edge covered by targets, has a standard error of 0.4 %.
    for cover in seen:
        for lines in (cover.sum(0), cover.sum(1)):
            np.testing.assert_allclose(lines, lines[::-1], rtol=0.02)


def test_fixed_subset_favours_no_position() -> None:
    """Given the free patches, each is kept with probability Kc / free, wherever it lies."""
    sampler = MultiBlockSampler(14, seed=4)
    steps = [step for step in range(60) if sampler.block_sizes(step)[1] == (14, 14)]  # free = outside the targets
    surplus, variance = np.zeros(196), np.zeros(196)
    for step in steps:
        context, target = sampler.sample(step, range(3000))
        free = uncovered(target, 196)
        p = free * (context.shape[1] / free.sum(1, keepdims=True))
        surplus += coverage(context, 14).ravel() - p.sum(0)
        variance += (p * (1 - p)).sum(0)
    z = surplus / np.sqrt(variance)
    assert len(steps) > 10 and np.abs(z).max() < 5
    assert 0.6 < (z**2).mean() < 1.5  # 196 nearly independent squares: standard error 0.1


def test_fixed_subsets_are_equally_likely() -> None:
    spec = MaskSpec(11, 0, False, 14, 14, 4, 6, 6, 14, 14, 10, keep=3)
    picked = reference_masks._random_subset(spec, np.arange(42000), np.full(42000, 7))
    assert (picked.sum(1) == 3).all() and not picked[:, 7:].any()
    counts = np.unique(picked[:, :7] @ (1 << np.arange(7)), return_counts=True)[1]
    assert len(counts) == 35  # 7 choose 3, each 1200 times
    assert ((counts - 1200) ** 2 / 1200).sum() < 34 + 5 * math.sqrt(2 * 34)


# --- bad arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"grid": 65}, ("grid=65", "64")),
        ({"grid": (14, 14, 3)}, ("(14, 14, 3)",)),
        ({"grid": 14.0}, ("grid=14.0",)),
        ({"mode": "faithfull"}, ("'faithfull'", "'fixed'")),
        ({"seed": -1}, ("seed=-1",)),
        ({"seed": 2**64}, (f"seed={2**64}",)),
        ({"target_scale": (0.2, 0.15)}, ("target_scale=(0.2, 0.15)",)),
        ({"target_aspect": (0, 1)}, ("target_aspect=(0, 1)",)),
        ({"context_scale": (0.85, 1.1)}, ("context_scale=(0.85, 1.1)",)),
        ({"context_scale": 0.85}, ("context_scale=0.85",)),
        ({"num_targets": 0}, ("num_targets=0",)),
        ({"min_keep": 0}, ("min_keep=0",)),
        ({"impl": "cuda"}, ("'cuda'", "'numpy'")),
        ({"grid": 6}, ("min_keep=10", "6x6", "target_scale", "min_keep <= 4")),
        ({"grid": 6, "mode": "faithful", "min_keep": 4}, ("min_keep=4", "2x2", "min_keep <= 3")),
        ({"context_scale": (0.04, 0.05), "mode": "faithful"}, ("context_scale", "min_keep <= 8")),
        ({"target_scale": (0.001, 0.002)}, ("0x0 block", "use a larger target_scale")),
        ({"target_scale": (0.8, 0.8)}, ("min_keep=10", "context patches", "num_targets")),
    ],
)
def test_bad_arguments_are_refused_with_the_value(arguments: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        MultiBlockSampler(**arguments)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid": 6},
        {"grid": 6, "mode": "faithful"},
        {"target_scale": (0.55, 0.65)},
        {"context_scale": (0.2, 0.3)},
    ],
)
def test_the_remedy_is_the_largest_min_keep_that_works(arguments: dict) -> None:
    with pytest.raises(UserError) as refused:
        MultiBlockSampler(min_keep=30, **arguments)
    remedy = int(str(refused.value).split("min_keep <= ")[1].split()[0])
    MultiBlockSampler(min_keep=remedy, **arguments).sample(0, range(1000))
    with pytest.raises(UserError):
        MultiBlockSampler(min_keep=remedy + 1, **arguments)


@pytest.mark.parametrize(
    ("step", "ids", "word"),
    [
        (-1, [0], "step=-1"),
        (2**32, [0], f"step={2**32}"),
        (0.5, [0], "step=0.5"),
        (0, [0, -7], "-7"),
        (0, [2**63], str(2**63)),
        (0, [0.5], "float64"),
        (0, torch.tensor([True]), "bool"),
        (0, [], "[0]"),
        (0, [[0]], "[1, 1]"),
    ],
)
def test_bad_steps_and_ids_are_refused_with_the_value(step: int, ids: list[int], word: str) -> None:
    with pytest.raises(UserError) as refused:
        MultiBlockSampler().sample(step, ids)
    assert word in str(refused.value)


def test_context_keep_replaces_the_quantile() -> None:
    sampler = MultiBlockSampler(8, min_keep=4, context_keep=15)
    for step in range(20):
        masks = sampler.sample(step, range(64))
        assert masks.context.shape == (64, 15)
        for context, target in zip(masks.context, masks.target, strict=True):
            assert not set(context.tolist()) & set(target.flatten().tolist())
    assert {keep for _, keep, _ in sampler.shapes()} == {15}
    with pytest.raises(UserError, match=r"context_keep=40 is too many: 4 targets of .* often leave only"):
        MultiBlockSampler(8, min_keep=4, context_keep=40)
    with pytest.raises(UserError, match="context_keep=9 has no meaning in faithful mode"):
        MultiBlockSampler(8, "faithful", min_keep=4, context_keep=9)
