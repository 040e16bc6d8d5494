"""What is shown when: order, crops, flips and photometric draws."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest

from cjepa_fast.errors import UserError
from cjepa_fast.manifest import Mixture
from cjepa_fast.philox import philox4x32
from cjepa_fast.views import batch_ids, crop_windows, epoch_order, flip_flags
from pictures import RATIO, SCALE, batches, fifty


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return fifty(tmp_path_factory.mktemp("images"))


# --- Philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that Random123 ships for philox4x32-10
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str):
    def words(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    low, high = words(key)
    counters = np.tile(np.array(words(counter), dtype=np.uint32), (2, 3, 1))
    assert (philox4x32(counters, (low, high)) == np.array(words(expected), dtype=np.uint32)).all()


# --- order


def test_epoch_order_is_pinned():
    """These numbers may never change: a checkpoint stores the step and relies on them."""
    assert epoch_order(10, seed=1, epoch=0).tolist() == [8, 7, 1, 6, 4, 3, 5, 2, 9, 0]
    assert epoch_order(10, seed=1, epoch=1).tolist() == [8, 0, 3, 9, 5, 6, 4, 1, 2, 7]
    assert epoch_order(10, seed=2**40 + 1, epoch=0).tolist() == [7, 3, 2, 9, 8, 1, 5, 4, 6, 0]


@pytest.mark.parametrize("n", [1, 2, 9, 1000])
def test_epoch_order_is_a_permutation(n: int):
    assert (np.sort(epoch_order(n, seed=5, epoch=2)) == np.arange(n)).all()


def test_epoch_order_is_uniform():
    """Every image is equally often at every place: chi-square over 5 x 5 with 16 degrees of freedom."""
    rounds = 4000
    counts = np.zeros((5, 5))
    for epoch in range(rounds):
        counts[np.arange(5), epoch_order(5, seed=0, epoch=epoch)] += 1
    assert ((counts - rounds / 5) ** 2 / (rounds / 5)).sum() < 39.3  # exceeded once in a thousand seeds


def test_batches_walk_the_epoch_order(source: Mixture):
    n, size = 50, 16
    for epoch in range(3):
        taken = [batch_ids(source, seed=9, step=3 * epoch + i, batch_size=size) for i in range(3)]
        assert [e for e, _, _ in taken] == [epoch] * 3 and not any(repeats.any() for _, _, repeats in taken)
        ids = np.concatenate([ids for _, ids, _ in taken])
        assert len(set(ids)) == 48 and (ids == epoch_order(n, seed=9, epoch=epoch)[:48]).all()
    dropped = [set(epoch_order(n, seed=9, epoch=epoch)[48:]) for epoch in range(3)]
    assert dropped[0] != dropped[1] != dropped[2]


def test_batch_sizes_that_do_not_fit(source: Mixture):
    with pytest.raises(UserError, match=r"batch_size=51 .* 50 images of an epoch; lower"):
        batches(source, batch_size=51)
    with pytest.raises(UserError, match=r"batch_size=15 .* 2 ranks"):
        batches(source, batch_size=15, world_size=2)


# --- crops


def slow_window(height: int, width: int, scale, ratio, rng: random.Random) -> tuple[int, int, int, int]:
    """The published definition of a random resized crop, one image at a time, with another generator."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def windows_of(n: int, height: int, width: int, scale=SCALE, ratio=RATIO, **changes) -> np.ndarray:
    sizes = np.tile(np.array([height, width], dtype=np.int32), (n, 1))
    return crop_windows(np.arange(n), sizes, **({"seed": 1, "epoch": 0, "scale": scale, "ratio": ratio} | changes))


def test_crop_windows_are_pinned():
    expected = [[31, 215, 341, 260], [96, 85, 279, 343], [18, 54, 357, 359], [7, 2, 348, 438]]
    assert windows_of(4, 375, 500).tolist() == expected


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (32, 32), (64, 300), (3, 2), (1, 1)])
@pytest.mark.parametrize("scale", [SCALE, (0.05, 0.2)])
def test_crop_distribution_is_the_definition(size: tuple[int, int], scale: tuple[float, float]):
    """Two-sample Kolmogorov-Smirnov on top, left, area and aspect against the slow definition."""
    n = 8000
    rng = random.Random(0)
    fast = windows_of(n, *size, scale=scale)
    slow = np.array([slow_window(*size, scale, RATIO, rng) for _ in range(n)])
    assert (fast[:, :2] >= 0).all() and (fast[:, 2:] >= 1).all() and (fast[:, :2] + fast[:, 2:] <= size).all()

    def features(window: np.ndarray) -> np.ndarray:
        top, left, h, w = window.T.astype(float)
        return np.stack([top, left, h * w, np.log(w / h), h + top, w + left])

    for a, b in zip(features(fast), features(slow), strict=True):
        grid = np.union1d(a, b)
        cdf_a, cdf_b = (np.searchsorted(np.sort(x), grid, side="right") / n for x in (a, b))
        assert np.abs(cdf_a - cdf_b).max() < 2.2 * math.sqrt(2 / n)  # p < 1e-4


def test_crop_moments_are_the_analytic_ones():
    """Where every first window fits, area is uniform in scale and log aspect uniform in log ratio."""
    n, side, scale = 20000, 4000, (0.3, 0.5)
    top, left, h, w = windows_of(n, side, side, scale=scale).T.astype(float)
    area, aspect = h * w / side**2, np.log(w / h)
    half = math.log(4 / 3)
    rounding = 3e-4  # of sides around 2000 pixels to whole ones
    assert area.min() >= scale[0] - rounding and area.max() <= scale[1] + rounding
    assert abs(area.mean() - 0.4) < 4 * 0.2 / math.sqrt(12 * n)
    assert np.abs(aspect).max() <= half + 1e-3 and abs(aspect.mean()) < 4 * half / math.sqrt(3 * n)
    assert abs(aspect.std() - half / math.sqrt(3)) < 0.01 * half
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 4 / math.sqrt(n)
    for offset, room in ((top, side - h), (left, side - w)):
        assert abs((offset / room).mean() - 0.5) < 4 / math.sqrt(12 * n)


@pytest.mark.parametrize(("size", "window"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))])
def test_crop_falls_back_to_the_centre(size: tuple[int, int], window: tuple[int, ...]):
    assert (windows_of(50, *size) == window).all()


def test_crops_depend_on_seed_epoch_and_id_alone():
    base = windows_of(100, 300, 400)
    picked = np.array([70, 3, 3, 41])
    sizes = np.tile(np.array([300, 400], dtype=np.int32), (4, 1))
    assert (crop_windows(picked, sizes, seed=1, epoch=0, scale=SCALE, ratio=RATIO) == base[picked]).all()
    assert (windows_of(100, 300, 400, seed=2) != base).any(axis=1).mean() > 0.95
    assert (windows_of(100, 300, 400, epoch=1) != base).any(axis=1).mean() > 0.95
    assert len(np.unique(base, axis=0)) > 95


def test_a_second_visit_is_drawn_anew():
    """And the first one as if there were no other."""
    ids = np.arange(200)
    sizes = np.tile(np.array([300, 400], dtype=np.int32), (200, 1))
    options = {"seed": 1, "epoch": 0, "scale": SCALE, "ratio": RATIO}
    windows = [crop_windows(ids, sizes, repeats=r, **options) for r in (np.zeros(200, int), np.arange(200) % 2, 2**23)]
    assert (windows[0] == crop_windows(ids, sizes, **options)).all()
    assert (windows[1][::2] == windows[0][::2]).all()
    flips = [flip_flags(ids, seed=1, epoch=0, repeats=r) for r in (0, 1, 2**23)]
    assert (flips[0] == flip_flags(ids, seed=1, epoch=0)).all()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (windows[i][1::2] != windows[j][1::2]).any(axis=1).mean() > 0.95
        assert 60 < (flips[i] != flips[j]).sum() < 140


def test_half_of_the_images_are_flipped():
    flags = [flip_flags(np.arange(4000), seed=0, epoch=epoch) for epoch in (0, 1)]
    assert all(abs(f.mean() - 0.5) < 4 / math.sqrt(4 * 4000) for f in flags)
    assert abs((flags[0] == flags[1]).mean() - 0.5) < 4 / math.sqrt(4 * 4000)
