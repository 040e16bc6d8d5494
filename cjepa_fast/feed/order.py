"""The order of the images: which ones an epoch visits, and which ones each batch holds.

Pure functions of (seed, epoch or step, image id). All draws come from Philox, so a resumed run needs its step alone,
and the number of ranks, threads or prefetched batches changes nothing.

Legend: n images in the data set, b images of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cjepa_fast.errors import UserError
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.philox import philox4x32

# Streams of draws: the last counter word. The mask sampler's stay below 2**30.
ORDER, VISITS, CROP, FLIP, PHOTO = (
    int.from_bytes(tag, "little") for tag in (b"ordr", b"visi", b"crop", b"flip", b"phot")
)
_STAND_IN = 2**23  # the visit number of a stand-in for a bad image: no weight gives an epoch that many


class Order(NamedTuple):
    """The steps of a run and the size of their batches."""

    seed: int
    batch_size: int  # images of all ranks; at most the visits of an epoch
    first_step: int = 0
    last_step: int | None = None  # not itself shown; None: without end


class Visits(NamedTuple):
    """Visits of images in epochs: all that a draw depends on."""

    ids: np.ndarray  # int64 [b]
    seed: int
    epoch: int | np.ndarray  # one, or int64 [b]
    repeats: int | np.ndarray = 0  # likewise: 0 for the first visit of an image in the epoch

    def at(self, places: np.ndarray) -> Visits:
        """Return the visits at positions `places`."""
        epoch, repeats = (np.broadcast_to(x, self.ids.shape)[places] for x in (self.epoch, self.repeats))
        return Visits(self.ids[places], self.seed, epoch, repeats)


def draw(visits: Visits, stream: int, attempt: int = 0) -> np.ndarray:
    """Return four random words for each visit: uint32 [b, 4]; an `attempt` below 256 gives further ones."""
    counter = np.empty((len(visits.ids), 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1] = visits.ids, attempt + 256 * np.asarray(visits.repeats)
    counter[:, 2], counter[:, 3] = visits.epoch, stream
    return philox4x32(counter, (visits.seed & 0xFFFFFFFF, visits.seed >> 32))


def _permutation(words: np.ndarray, n: int) -> np.ndarray:
    """Return a permutation of range(n), int64: the stable order of the 64-bit keys in uint32 words [..., 2 k].

    Sorting has one right answer. A library's shuffle may change with its version or the machine.
    """
    keys = (words[:, ::2].astype(np.uint64) << np.uint64(32) | words[:, 1::2]).reshape(-1)[:n]
    return np.argsort(keys, kind="stable").astype(np.int64)


@lru_cache(maxsize=2)  # a step costs microseconds, the order of ImageNet a third of a second
def epoch_order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch: a read-only int64 permutation of range(n)."""
    order = _permutation(draw(Visits(np.arange((n + 1) // 2), seed, epoch), ORDER), n)
    order.flags.writeable = False
    return order


def epoch_visits(
    counts: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids that an epoch over several sources visits, not yet shuffled.

    A source of n images and weight w gets m = round(w n) visits. Each image gets m // n of them. The m % n left over
    walk from epoch to epoch through one permutation after another, so over the epochs all images are visited equally
    often to within one. (Where a permutation ends inside an epoch, an image may get two of them.)

    Returns:
        ids: int64 [m], ascending, the first source's images before the second's.
        repeats: int64 [m], 0 for the first visit of an id in this epoch, 1 for the second, so that its crops differ.
    """
    found = []
    for source, (n, weight) in enumerate(zip(counts, weights, strict=True)):
        whole, rest = divmod(round(weight * n), n)
        visits = np.full(n, whole, dtype=np.int64)
        at, end = epoch * rest, (epoch + 1) * rest
        while at < end:
            turn, start = divmod(at, n)
            stop = min(n, start + end - at)
            words = draw(Visits(np.arange(n), seed, turn), VISITS, attempt=source)[:, :2]
            visits[_permutation(words, n)[start:stop]] += 1
            at += stop - start
        found.append(visits)
    visits = np.concatenate(found)
    ids = np.repeat(np.arange(len(visits)), visits)
    return ids, np.arange(len(ids)) - np.repeat(np.cumsum(visits) - visits, visits)


@lru_cache(maxsize=2)
def _shuffled_visits(source: Mixture, *, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    counts = [len(manifest) for manifest in source.manifests]
    ids, repeats = epoch_visits(counts, source.weights, seed=seed, epoch=epoch)
    order = epoch_order(len(ids), seed=seed, epoch=epoch)
    return ids[order], repeats[order]


def batch_ids(
    source: Mixture, *, seed: int, step: int, batch_size: int, skipped: Collection[int] = ()
) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the epoch of a global step, and the images of its global batch.

    An epoch has source.visits // batch_size steps; the images left over differ from epoch to epoch. A skipped image is
    replaced by the one half an epoch further on, or the first sound one behind that. This stand-in is hardly ever in
    the same batch, and its crop is drawn anew.

    Returns:
        epoch; ids, int64 [b]; repeats, int64 [b], 0 for the first visit of an id in the epoch.

    Raises:
        UserError: a batch is larger than an epoch, or every image is skipped.
    """
    n = source.visits
    if batch_size > n:
        raise UserError(f"batch_size={batch_size} is larger than the {n} images of an epoch; lower it to at most {n}")
    epoch, at = divmod(step, n // batch_size)
    ids, repeats = _shuffled_visits(source, seed=seed, epoch=epoch)
    start = at * batch_size
    chosen, visits = ids[start : start + batch_size].copy(), repeats[start : start + batch_size].copy()
    bad = np.fromiter(skipped, dtype=np.int64, count=len(skipped))
    for i in np.flatnonzero(np.isin(chosen, bad)):
        around = np.roll(ids, -(start + i + n // 2))
        good = np.flatnonzero(~np.isin(around, bad))
        if not len(good):
            raise UserError("none of the images is left that is not bad; restore them")
        chosen[i], visits[i] = around[good[0]], _STAND_IN
    return epoch, chosen, visits
