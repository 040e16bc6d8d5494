"""Batches: indexed images to uint8 tensors, for training and for evaluation.

Legend: b images of one rank (the global batch over world_size), V views, H = W = image_size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cjepa_fast.config import DataConfig
from cjepa_fast.errors import UserError
from cjepa_fast.feed.bad import BadImages, diagnose
from cjepa_fast.feed.decode import Failed, Options, Place, center_graph, dali, stream, training_graph
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.feed.order import Order, Visits, batch_ids
from cjepa_fast.feed.read import Request
from cjepa_fast.feed.views import MAX_VIEWS, Views, draw_views, photometric

if TYPE_CHECKING:
    import torch

PREFETCH = 2  # batches in flight: one is decoded while the caller computes on another; more only take memory
_DRAWN_AT_ONCE = 2048  # images: for 256 the draws cost 3 us each, most of it NumPy's calls, for 2,048 less than one


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The images of one rank in one training step."""

    step: int
    epoch: int
    ids: torch.Tensor  # int64 [b] on the CPU, image ids in the whole data set
    images: torch.Tensor  # uint8 RGB [b, H, W, 3], or [V, b, H, W, 3] of several views, on the requested device
    wait_ms: float  # time for which the caller was blocked


class Batches:
    """The training batches of one rank, for steps order.first_step <= step < order.last_step.

    Rank r gets images [r * b, (r + 1) * b) of the global batch: concatenated over the ranks, the batch is the same for
    any world size. The images stay valid as long as they are referenced.

    Several views lie image by image in memory, so images[v] is a strided [b, H, W, 3]. Their colours are independent.
    Unless `views.independent`, they share crop and flip, so that their patches correspond; only the crop is decoded.
    View 0 is always the single view, bit for bit.

    Args:
        source: the indexed images.
        data: crop_scale, hflip and augment are used.
        order: batch_size is a multiple of place.world_size and at most source.visits.
        bad: known bad images, and the policy for another one; by default an error. After a skip, the pipeline starts
            anew at the same step, with the stand-in of `batch_ids`.

    Raises:
        UserError: on construction, for a batch size that does not fit. From `next`: an image is bad (the message names
            the file), too many are, or the storage is gone.
    """

    def __init__(
        self, source: Mixture, data: DataConfig, views: Views, order: Order, place: Place, bad: BadImages | None = None
    ) -> None:
        assert 0 <= place.rank < place.world_size, place
        assert 1 <= views.count <= MAX_VIEWS, views
        if order.batch_size % place.world_size:
            raise UserError(f"batch_size={order.batch_size} is not a multiple of {place.world_size} ranks; make it one")
        # Fail here, not in the loader thread: a batch larger than the data set, no DALI
        batch_ids(source, seed=order.seed, step=order.first_step, batch_size=order.batch_size)
        dali()
        known = bad or BadImages(source)
        draw = partial(draw_views, data, photometric(data), views)
        none = np.arange(0)
        options = Options(
            # DALI's graph keeps its functions alive: they hold values, never this object, which could not be freed
            graph=partial(training_graph, views=views, place=place),
            inputs=tuple(draw(Visits(none, order.seed, epoch=0), source.sizes[none])),
            batch_size=order.batch_size // place.world_size,
            place=place,
            prefetch=PREFETCH,
        )
        requests = partial(_training_requests, source, order, place, draw, known)
        self._views, self._decoded = views.count, _decoded(source, requests, options, order.first_step, known)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        import torch

        start = time.perf_counter()
        request, images = next(self._decoded)
        return Batch(
            step=request.step,
            epoch=request.epoch,
            ids=torch.from_numpy(request.ids.copy()),
            images=images if self._views == 1 else images.transpose(0, 1),
            wait_ms=(time.perf_counter() - start) * 1e3,
        )

    def close(self) -> None:
        """Stop reading and decoding, and free DALI's buffers; batches already handed out stay valid."""
        self._decoded.close()


def _training_requests(
    source: Mixture, order: Order, place: Place, draw: Callable[..., dict[str, np.ndarray]], bad: BadImages, step: int
) -> Iterator[Request]:
    """Yield this rank's requests from a step on. Draws for several steps at once, which costs less."""
    b = order.batch_size // place.world_size
    mine = slice(place.rank * b, (place.rank + 1) * b)
    while order.last_step is None or step < order.last_step:
        stop = step + max(1, _DRAWN_AT_ONCE // b)
        steps = range(step, stop if order.last_step is None else min(stop, order.last_step))
        planned = [
            batch_ids(source, seed=order.seed, step=s, batch_size=order.batch_size, skipped=bad.ids) for s in steps
        ]
        epochs, ids, repeats = zip(*planned, strict=True)
        ids, repeats = (np.concatenate([part[mine] for part in parts]) for parts in (ids, repeats))
        drawn = draw(Visits(ids, order.seed, np.repeat(epochs, b), repeats), source.sizes[ids])
        for k, epoch in enumerate(epochs):
            part = slice(k * b, (k + 1) * b)
            inputs = {name: value[part] for name, value in drawn.items()}
            yield Request(ids=ids[part], inputs=inputs, step=step + k, epoch=epoch)
        step = steps.stop


def center_batches(
    source: Mixture, ids: np.ndarray, image_size: int, batch_size: int, place: Place, bad: BadImages | None = None
) -> Iterator[torch.Tensor]:
    """Yield the evaluation view of images `ids`, in that order: uint8 [b, H, W, 3], the last batch may be short.

    Resizes the shorter side to image_size * 256 / 224, or to image_size if the image is no larger than that (a CIFAR
    image at 32 pixels stays as it is), and cuts the central square. Sizes round as in torchvision. A skipped bad image
    is replaced by the next one with its label.

    Args:
        place: all of `ids` are decoded, whatever the rank.

    Raises:
        UserError: as `Batches`.
    """
    known = bad or BadImages(source)
    dali()  # fail here, not at the first batch

    def requests(step: int) -> Iterator[Request]:
        for start in range(step * batch_size, len(ids), batch_size):
            chunk = np.array([_with_its_label(source, i, known.ids) for i in ids[start : start + batch_size].tolist()])
            size = source.sizes[chunk].astype(np.int64)
            short = size.min(axis=1, keepdims=True)
            size = size * np.where(short <= image_size, image_size, image_size * 256 // 224) // short
            corner = np.rint((size - image_size) / 2).astype(np.int32)
            inputs = {"size": size.astype(np.float32), "corner": corner}
            yield Request(ids=chunk, inputs=inputs, step=start // batch_size)

    options = Options(
        graph=partial(center_graph, image_size=image_size, place=place), inputs=("size", "corner"),
        batch_size=batch_size, place=place, prefetch=PREFETCH,
    )  # fmt: skip
    return (images for _, images in _decoded(source, requests, options, 0, known))


def _with_its_label(source: Mixture, i: int, bad: Collection[int]) -> int:
    """Return image i, or the first sound one behind it (around the end) with its label.

    Raises:
        UserError: none is left.
    """
    if i not in bad:
        return i
    alike = np.arange(len(source)) if source.labels is None else np.flatnonzero(source.labels == source.labels[i])
    after = np.roll(alike, -int(np.searchsorted(alike, i, side="right")))
    good = after[~np.isin(after, list(bad))]
    if not len(good):
        raise UserError(f"{source.name(i)}: is bad, and no image with its label is left")
    return int(good[0])


def _decoded(
    source: Mixture, requests: Callable[[int], Iterator[Request]], options: Options, step: int, bad: BadImages
) -> Generator[tuple[Request, torch.Tensor], None, None]:
    """Decode requests(step). After an error, another pipeline starts at the failed step, unless the error is final."""
    failures = 0
    while True:
        pipeline = stream(source, requests(step), options)
        try:
            for request, images in pipeline:
                yield request, images
                step, failures = request.step + 1, 0
            return
        except Failed as failed:
            failures += 1
            diagnose(source, failed, options, failures, bad)
        finally:
            pipeline.close()
