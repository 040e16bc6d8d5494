"""How long the steps of the main job wait for their images."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bench.readers import Images
from cjepa_fast import ops, train
from cjepa_fast.config import schema as config
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.engine.step import forward_backward
from cjepa_fast.feed.batches import Batches
from cjepa_fast.feed.decode import Place
from cjepa_fast.feed.index import open_sources
from cjepa_fast.feed.order import Order
from cjepa_fast.feed.views import Views

WARM_UP = 5
MOST_IMAGES = 256  # of a preset's global batch on this one device


def waits_in_training(
    preset: str, laid_out: Mapping[str, Images], steps: int, compiled: str, *, device: str, threads: int
) -> dict[str, Any]:  # fmt: skip
    """Trains a few steps as cjepa_fast.train does, with the feed and, before and after, with one batch over and over.

    The device is waited for after every step, so that what a step waits for data is time in which the device idles.
    """
    c = PRESETS[preset]
    images = laid_out["imagenet" if c.model.image_size > 64 else "cifar"]
    source = open_sources([str(images.files)])
    batch_size = min(c.optim.batch_size, MOST_IMAGES, len(source))
    c = dataclasses.replace(
        c,
        optim=dataclasses.replace(c.optim, batch_size=batch_size),
        runtime=dataclasses.replace(c.runtime, compile=compiled),  # type: ignore[arg-type]
    )
    where = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    if device == "cpu":
        torch.set_num_threads(threads)
    step, said = training_step(c, where)
    batches = Batches(
        source, c.data, Views(c.model.image_size), Order(c.seed, batch_size),
        Place(device=str(where), threads=c.runtime.data_threads),
    )  # fmt: skip
    same = next(batches)
    still = [(0.0, milliseconds) for _, milliseconds in timed_steps(step, itertools.repeat(same), WARM_UP + steps // 2)]
    fed = timed_steps(step, batches, WARM_UP + steps)
    batches.close()
    still += timed_steps(step, itertools.repeat(same), steps - steps // 2)
    return {
        "images": images.name, "batch_size": batch_size, "precision": c.model.precision, "compiled": said,
        "threads_used": c.runtime.data_threads,
        **figures(fed[WARM_UP:], [milliseconds for _, milliseconds in still[WARM_UP:]]),
    }  # fmt: skip


def figures(fed: Sequence[tuple[float, float]], without: Sequence[float]) -> dict[str, float | int]:
    """Of (wait, whole step) in ms, and whole steps without the feed."""
    waits, whole = np.array(fed).T
    return {
        "steps": len(fed),
        "step_ms": statistics.median(whole),
        "step_ms_without_feed": statistics.median(without),
        "wait_ms_median": statistics.median(waits),
        "wait_ms_p95": float(np.percentile(waits, 95)),
        "wait_ms_max": float(waits.max()),
        "share_waited": float(waits.sum() / whole.sum()),
        "steps_over_1_ms": float((waits > 1).mean()),
        "steps_over_1_percent": float((waits > 0.01 * whole).mean()),
    }


def timed_steps(step: Callable[[Any], None], batches: Iterator[Any], count: int) -> list[tuple[float, float]]:
    """Milliseconds that each of `count` steps waited for its batch, and that it took with the wait."""
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        step(batch)
        found.append((1e3 * waited, 1e3 * (time.perf_counter() - begin)))
    return found


def training_step(c: config.Config, device: torch.device) -> tuple[Callable[[Any], None], str]:
    """A function that trains on one batch and waits for the device; and whether the blocks are compiled."""
    ops.require(c.runtime.kernels, device.type)
    torch.manual_seed(c.seed)
    networks = train.build_networks(c).to(device)
    compiled = train.compile_blocks(networks, c.runtime.compile, device, c.mask.mode)
    optimizer, weights = train.build_optimizer(c, networks, sharded=False), train.loss_weights(c)
    sampler, unions = train.build_sampler(c), train.needs_unions(c)
    counter = itertools.count()

    def step(batch: Any) -> None:
        parts = sampler.sample_parts(next(counter), batch.ids, c.runtime.accumulate, union=unions)
        masks = [train.place_masks(part, c.runtime.compile, device) for part in parts]
        forward_backward(networks, batch.images, masks, weights)
        optimizer.step(momentum=c.optim.ema)
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step, compiled
