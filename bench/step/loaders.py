"""The feed of each trainer of `bench.step`: JPEGs decoded and masks drawn while the trainer steps.

Ours is the main job's feed. The published trainer reads with Pillow in the workers of a torch DataLoader, whose
collator draws the masks by loops in Python. `tuned` decodes and resizes bytes in such workers, by torchvision where
torchvision is installed, and gets our masks.
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

from bench.feed import datasets
from bench.feed.images import Images
from bench.step.references import Batch, Drawn, Trainer, eager
from bench.step.trainers import Ours
from bench.training import build_sampler, open_feed
from cjepa_fast.config import Config
from cjepa_fast.masks import MultiBlockSampler


class Feed(NamedTuple):
    """An endless stream of batches as a trainer's `step` takes them, and the cost of drawing masks on one core."""

    batches: Iterator[Batch]
    mask_us: float  # an image
    note: str


def ours(trainer: Trainer, c: Config, images: Images, threads: int, device: torch.device) -> Feed:
    assert isinstance(trainer, Ours)
    training = trainer.training
    feed = open_feed(c, [str(images.files)], images.batch_size, device, threads)
    batches = ((batch.images, training.draw(step, batch.ids)) for step, batch in enumerate(feed))
    return Feed(batches, _mask_us(lambda step: _draw(training.sampler, step, images), images.batch_size), "DALI")


def published(trainer: Trainer, c: Config, images: Images, threads: int, device: torch.device) -> Feed:
    draw = functools.partial(
        eager.collate, c.model.image_size // c.model.patch_size, generator=torch.Generator().manual_seed(c.seed),
        min_keep=c.mask.min_keep, targets=c.mask.num_targets,
    )  # fmt: skip

    def collate(views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return torch.stack(views), draw(len(views))

    def batches() -> Iterator[Batch]:
        for pixels, masks in _loader(datasets.Pillow(images), images, threads, device, collate):
            context, *targets = (mask.to(device, non_blocking=True) for mask in masks)
            yield pixels.to(device, non_blocking=True), context, None, targets

    return Feed(batches(), _mask_us(lambda _: draw(images.batch_size), images.batch_size), "Pillow")


def tuned(trainer: Trainer, c: Config, images: Images, threads: int, device: torch.device) -> Feed:
    sampler, fast = build_sampler(c), importlib.util.find_spec("torchvision") is not None
    dataset = datasets.TorchvisionTensors(images) if fast else datasets.PillowBytes(images)

    def batches() -> Iterator[Batch]:
        for step, pixels in enumerate(_loader(dataset, images, threads, device, None)):
            yield trainer.batch(_draw(sampler, step, images)._replace(images=pixels))

    note = "torchvision" if fast else "Pillow, bytes"
    return Feed(batches(), _mask_us(lambda step: _draw(sampler, step, images), images.batch_size), note)


FEEDS: dict[str, Callable[[Trainer, Config, Images, int, torch.device], Feed]] = {
    "ours": ours, "eager": published, "ijepa": published, "tuned": tuned,
}  # fmt: skip


def _draw(sampler: MultiBlockSampler, step: int, images: Images) -> Drawn:
    ids = range(step * images.batch_size, (step + 1) * images.batch_size)
    return Drawn(torch.empty(0), sampler.sample(step, ids), step, ids)


def _loader(
    dataset: datasets.Files, images: Images, threads: int, device: torch.device,
    collate: Callable[[list[Tensor]], Any] | None,
) -> Iterator[Any]:  # fmt: skip
    loader = DataLoader(
        dataset, batch_size=images.batch_size, sampler=datasets.Endless(images.count), num_workers=threads,
        pin_memory=device.type == "cuda", multiprocessing_context="fork", collate_fn=cast(Any, collate),
    )  # fmt: skip
    return iter(loader)


def _mask_us(draw: Callable[[int], Any], images: int) -> float:
    """Return microseconds an image, the best of a few batches."""
    spent = []
    for step in range(5):
        begin = time.perf_counter()
        draw(step)
        spent.append(time.perf_counter() - begin)
    return 1e6 * min(spent) / images
