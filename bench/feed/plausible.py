"""The comparison of a reader's images with Pillow's random crops of the same images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.feed.datasets import MEAN, STD, Pillow, random_window
from bench.feed.images import Images

CHECKED = 512  # images of a reader that are compared
# figures of an image; compared are their mean over images and their spread between images
FEATURES = ("red", "green", "blue", "red - blue", "contrast", "top - bottom", "left - right", "detail")
_SIGMAS, _SLACK = 5.0, 2.0  # standard errors and levels (of 255) that a mean may differ by


class Seen(NamedTuple):
    """Features of some images of a reader."""

    shape: tuple[int, ...]  # of a batch, [b, H, W, 3]
    features: np.ndarray  # [n, len(FEATURES)], in levels of 0 to 255


def as_pixels(batch: Tensor) -> np.ndarray:
    """Convert a batch, uint8 NHWC or normalised float NCHW, to float32 [b, H, W, 3] from 0 to 255."""
    batch = batch.cpu()
    if batch.dtype == torch.uint8:
        return batch.float().numpy()
    return (batch.permute(0, 2, 3, 1).numpy() * STD + MEAN) * 255


def features(pixels: np.ndarray) -> np.ndarray:
    """Compute FEATURES of every image: [b, H, W, 3] to [b, 8]."""
    half_h, half_w = pixels.shape[1] // 2, pixels.shape[2] // 2
    red, green, blue = pixels.mean(axis=(1, 2)).T
    grey = pixels.mean(axis=3)
    top_bottom = grey[:, :half_h].mean(axis=(1, 2)) - grey[:, half_h:].mean(axis=(1, 2))
    left_right = grey[:, :, :half_w].mean(axis=(1, 2)) - grey[:, :, half_w:].mean(axis=(1, 2))
    detail = np.abs(np.diff(grey, axis=2)).mean(axis=(1, 2))
    columns = (red, green, blue, red - blue, grey.std(axis=(1, 2)), top_bottom, left_right, detail)
    return np.stack(columns, axis=1)


def look(batches: Any, count: int) -> Seen:
    """Compute the features of at least `count` images of a stream."""
    found, n, shape = [], 0, ()
    while n < count:
        pixels = as_pixels(next(batches))
        if pixels.ndim != 4 or (shape and pixels.shape != shape):
            raise ValueError(f"a batch of shape {pixels.shape}")
        shape = pixels.shape
        found.append(features(pixels))
        n += len(pixels)
    return Seen(tuple(shape), np.concatenate(found))


def look_with_pillow(images: Images, count: int) -> Seen:
    """Compute the features of random crops by Pillow, resized with antialias: the truth."""
    from PIL import Image

    paths, views = Pillow(images).paths, []
    for i in np.random.default_rng(1).permutation(len(paths))[:count]:
        with Image.open(paths[i]) as image:
            top, left, h, w = random_window(image.height, image.width)
            box = (left, top, left + w, top + h)
            small = image.convert("RGB").resize((images.size, images.size), Image.Resampling.BILINEAR, box)
            views.append(np.asarray(small, dtype=np.float32))
    pixels = np.stack(views)
    return Seen((images.batch_size, *pixels.shape[1:]), features(pixels))


def implausible(found: Seen, truth: Seen) -> str | None:
    """Return the reason why a reader's images cannot be random crops of the right images; None if they may be.

    The mean of a feature may differ by five standard errors and two levels, the spread of a colour between images by a
    third. Detail, which shows resizing without antialias, may differ by a third. Nine of ten images must be distinct.
    """
    if found.shape != truth.shape:
        return f"batches of {found.shape} instead of {truth.shape}"
    different = len(np.unique(found.features, axis=0))
    for k, name in enumerate(FEATURES):
        a, b = found.features[:, k], truth.features[:, k]
        error = float(np.sqrt(a.var() / len(a) + b.var() / len(b)))
        limit = b.mean() / 3 if name == "detail" else _SIGMAS * error + _SLACK
        if not abs(a.mean() - b.mean()) <= limit:
            return f"{name} is {a.mean():.1f} on average instead of {b.mean():.1f}"
        if name in ("red", "green", "blue") and not 2 / 3 < a.std() / b.std() < 3 / 2:
            return f"{name} differs by {a.std():.1f} between images instead of {b.std():.1f}"
    if different < 0.9 * len(found.features):
        return f"only {different} of {len(found.features)} images are different"
    return None
