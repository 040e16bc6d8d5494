"""The order of the images: shuffling, weights, and the batches of an epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cjepa_fast.errors import UserError
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.feed.order import CROP, FLIP, ORDER, PHOTO, VISITS, batch_ids, epoch_order, epoch_visits
from pictures import batches, fifty

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def source(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return fifty(tmp_path_factory.mktemp("images"))


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


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([1.0, 2.0, 0.5, 0.3, 2.7, 1.01])), min_size=1, max_size=3
    ),
    seed=st.integers(0, 2**64 - 1),
    epochs=st.integers(1, 8),
)  # fmt: skip
def test_visits_are_what_the_weights_say(parts: list[tuple[int, float]], seed: int, epochs: int):
    counts, weights = [n for n, _ in parts], [w for _, w in parts]
    total: Counter[int] = Counter()
    for epoch in range(epochs):
        ids, repeats = epoch_visits(counts, weights, seed=seed, epoch=epoch)
        assert ids.dtype == np.int64 and (np.diff(ids) >= 0).all()
        start = 0
        for n, w in parts:
            visits = np.bincount(ids[(ids >= start) & (ids < start + n)] - start, minlength=n)
            assert visits.sum() == round(w * n)
            assert visits.min() >= round(w * n) // n and visits.max() <= round(w * n) // n + 2
            start += n
        for i in set(ids.tolist()):
            assert repeats[ids == i].tolist() == list(range((ids == i).sum()))
        total.update(ids.tolist())
    start = 0
    for n, w in parts:  # over the epochs, every sample equally often to within one
        visits = [total[start + i] for i in range(n)]
        assert max(visits) - min(visits) <= 1 and sum(visits) == epochs * round(w * n)
        start += n


def test_weight_one_is_every_image_once():
    ids, repeats = epoch_visits([5, 3], [1.0, 1.0], seed=9, epoch=4)
    assert ids.tolist() == list(range(8)) and not repeats.any()


def test_visits_are_pinned_and_depend_on_seed_epoch_and_source():
    """These numbers may never change: a checkpoint stores the step and relies on them."""

    def visits(seed: int, epoch: int) -> list[int]:
        return epoch_visits([12, 12], [0.5, 0.5], seed=seed, epoch=epoch)[0].tolist()

    assert visits(1, 0) == [0, 1, 3, 4, 7, 8, 12, 15, 16, 17, 18, 22]
    assert sorted(visits(1, 0) + visits(1, 1)) == list(range(24))
    assert visits(1, 2) != visits(1, 0) != visits(2, 0)
    first = visits(2**40, 0)
    assert [i for i in first if i < 12] != [i - 12 for i in first if i >= 12]


def test_streams_are_apart():
    """Each draw has a stream of its own, and none is the mask sampler's."""
    streams = {ORDER, VISITS, CROP, FLIP, PHOTO}
    assert len(streams) == 5 and min(streams) > 2**30
