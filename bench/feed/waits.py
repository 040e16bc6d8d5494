"""The time that the main job's steps wait for their images."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bench.feed.images import Images
from bench.training import Training, open_feed
from cjepa_fast import config
from cjepa_fast.config.presets import PRESETS

WARM_UP = 5
MOST_IMAGES = 256  # of a preset's global batch on this one device


def waits_in_training(
    preset: str, laid_out: Mapping[str, Images], steps: int, compiled: str, *, device: str, threads: int
) -> dict[str, Any]:  # fmt: skip
    """Train some steps with the feed and, before and after, on a single batch again and again.

    Every step waits for the device, so a wait for data is time in which the device idles.
    """
    c = PRESETS[preset]
    images = laid_out["imagenet" if c.model.image_size > 64 else "cifar"]
    c = config.replace(
        c, {"optim.batch_size": min(c.optim.batch_size, MOST_IMAGES, images.count), "runtime.compile": compiled}
    )
    where = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    if device == "cpu":
        torch.set_num_threads(threads)
    torch.manual_seed(c.seed)
    training, counter = Training(c, where), itertools.count()

    def step(batch: Any) -> None:
        training.step(batch.images, training.draw(next(counter), batch.ids), c.optim.ema)
        if device == "cuda":
            torch.cuda.synchronize(where)

    batches = open_feed(c, [str(images.files)], c.optim.batch_size, where, c.runtime.data_threads)
    same = next(batches)
    still = [(0.0, milliseconds) for _, milliseconds in timed_steps(step, itertools.repeat(same), WARM_UP + steps // 2)]
    fed = timed_steps(step, batches, WARM_UP + steps)
    batches.close()
    still += timed_steps(step, itertools.repeat(same), steps - steps // 2)
    return {
        "images": images.name, "batch_size": c.optim.batch_size, "precision": c.model.precision,
        "compiled": training.compiled, "threads_used": c.runtime.data_threads,
        **figures(fed[WARM_UP:], [milliseconds for _, milliseconds in still[WARM_UP:]]),
    }  # fmt: skip


def figures(fed: Sequence[tuple[float, float]], without: Sequence[float]) -> dict[str, float | int]:
    """Return the figures of steps with the feed, (wait, whole step) in ms, and of whole steps without."""
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
    """Take `count` steps; return milliseconds waited for the batch, and of the step with the wait, of each."""
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        step(batch)
        found.append((1e3 * waited, 1e3 * (time.perf_counter() - begin)))
    return found
