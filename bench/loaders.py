"""What feeds each trainer of `bench.step` from JPEGs, decoding and drawing masks while it steps.

Ours is fed as `cjepa_fast.train` feeds it. The published trainer reads with Pillow in the workers of a torch
DataLoader, whose collator draws the masks by loops in Python. `tuned` decodes and resizes bytes with torchvision in
such workers where torchvision is installed, and gets our masks.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench import readers
from bench.references import Batch, Trainer, eager
from cjepa_fast import train
from cjepa_fast.config import Config
from cjepa_fast.feed.batches import Batches
from cjepa_fast.feed.decode import Place
from cjepa_fast.feed.index import open_sources
from cjepa_fast.feed.order import Order
from cjepa_fast.feed.views import Views
from cjepa_fast.masks import MultiBlockSampler


class Feed(NamedTuple):
    """Batches as a trainer's `step` takes them, without end, and what drawing masks costs one core."""

    batches: Iterator[Batch]
    mask_us: float  # an image
    note: str


def ours(trainer: Trainer, c: Config, images: readers.Images, threads: int, device: torch.device) -> Feed:
    sampler, unions = train.build_sampler(c), train.needs_unions(c)
    feed = Batches(
        open_sources([str(images.files)]), c.data, Views(images.size), Order(c.seed, images.batch_size),
        Place(device=str(device), threads=threads),
    )  # fmt: skip

    def batches() -> Iterator[Batch]:
        for step, batch in enumerate(feed):
            yield batch.images, [sampler.sample(step, batch.ids, union=unions).to(device)]

    return Feed(batches(), _mask_us(lambda step: _draw(sampler, step, images), images.batch_size), "DALI")


def published(trainer: Trainer, c: Config, images: readers.Images, threads: int, device: torch.device) -> Feed:
    draw = functools.partial(
        eager.collate, c.model.image_size // c.model.patch_size, generator=torch.Generator().manual_seed(c.seed),
        min_keep=c.mask.min_keep, targets=c.mask.num_targets,
    )  # fmt: skip

    def collate(views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return torch.stack(views), draw(len(views))

    def batches() -> Iterator[Batch]:
        for pixels, masks in _loader(readers.Pillow(images), images, threads, device, collate):
            context, *targets = (mask.to(device, non_blocking=True) for mask in masks)
            yield pixels.to(device, non_blocking=True), context, None, targets

    return Feed(batches(), _mask_us(lambda _: draw(images.batch_size), images.batch_size), "Pillow")


def tuned(trainer: Trainer, c: Config, images: readers.Images, threads: int, device: torch.device) -> Feed:
    sampler, fast = train.build_sampler(c), importlib.util.find_spec("torchvision") is not None
    dataset = readers.TorchvisionTensors(images) if fast else readers.PillowBytes(images)

    def batches() -> Iterator[Batch]:
        for step, pixels in enumerate(_loader(dataset, images, threads, device, None)):
            yield trainer.batch(pixels, _draw(sampler, step, images))

    note = "torchvision" if fast else "Pillow, bytes"
    return Feed(batches(), _mask_us(lambda step: _draw(sampler, step, images), images.batch_size), note)


FEEDS: dict[str, Callable[[Trainer, Config, readers.Images, int, torch.device], Feed]] = {
    "ours": ours, "eager": published, "ijepa": published, "tuned": tuned,
}  # fmt: skip


def _draw(sampler: MultiBlockSampler, step: int, images: readers.Images) -> Any:
    return sampler.sample(step, range(step * images.batch_size, (step + 1) * images.batch_size))


def _loader(
    dataset: readers.Files, images: readers.Images, threads: int, device: torch.device,
    collate: Callable[[list[Tensor]], Any] | None,
) -> Iterator[Any]:  # fmt: skip
    loader = DataLoader(
        dataset, batch_size=images.batch_size, sampler=readers.Endless(images.count), num_workers=threads,
        pin_memory=device.type == "cuda", multiprocessing_context="fork", collate_fn=cast(Any, collate),
    )  # fmt: skip
    return iter(loader)


def _mask_us(draw: Callable[[int], Any], images: int) -> float:
    """Microseconds an image, the best of a few batches."""
    spent = []
    for step in range(5):
        begin = time.perf_counter()
        draw(step)
        spent.append(time.perf_counter() - begin)
    return 1e6 * min(spent) / images
