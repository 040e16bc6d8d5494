"""What is shown when: order, crop windows, flips and photometric draws, pure functions of (seed, epoch, image id).

Nothing here keeps random state, looks at a pixel or knows of DALI. All draws come from Philox, so a run resumes from
its step alone and shows the same whatever the number of ranks, threads or prefetched batches.

Legend: n images in the source, b images of a batch or of a rank's part of it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cjepa_fast.errors import UserError
from cjepa_fast.feed.manifest import Mixture
from cjepa_fast.philox import philox4x32

# The last counter word keeps the streams of one seed apart; the mask sampler's stay below 2**30 there.
_ORDER, _CROP, _FLIP, _PHOTO = (int.from_bytes(tag, "little") for tag in (b"ordr", b"crop", b"flip", b"phot"))

_CROP_ATTEMPTS = 10  # torchvision.transforms.RandomResizedCrop
_STAND_IN = 2**23  # the visit of an image that stands in for a bad one: no weight gives an epoch that many
MAX_VIEWS = 16  # of an image; 16 counters of a visit are a view's

# Luma, and the two chroma axes, of RGB: YIQ of NTSC, as in DALI's colour operators.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_GREY = np.tile(_YIQ[0], (3, 1))
_CHROMA = np.eye(3) - _GREY
_QUARTER = np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]])  # turn of chroma, from red towards green
_TURNED = np.linalg.inv(_YIQ) @ _QUARTER @ _YIQ


def _draw(
    index: np.ndarray, attempt: int, *, seed: int, epoch: int, stream: int, repeats: np.ndarray | int = 0
) -> np.ndarray:
    """Four uint32 words per index, [len(index), 4]."""
    counter = np.empty((len(index), 4), dtype=np.uint32)
    counter[:, 0] = index
    counter[:, 1] = attempt + 256 * np.asarray(repeats)
    counter[:, 2:] = epoch, stream
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))


def _uniform(words: np.ndarray) -> np.ndarray:
    """uint32 words to float64 in the open interval (0, 1)."""
    return (words + 0.5) * 2.0**-32


@lru_cache(maxsize=2)  # a step costs microseconds, the order of ImageNet a third of a second
def epoch_order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch `epoch`: a read-only int64 permutation of range(n).

    Sorts random 64-bit keys, ties by id. Sorting has one right answer, so unlike a library's shuffle the
    result cannot change with the version of NumPy or the machine.
    """
    words = _draw(np.arange((n + 1) // 2), 0, seed=seed, epoch=epoch, stream=_ORDER).astype(np.uint64)
    keys = (words[:, ::2] << np.uint64(32) | words[:, 1::2]).reshape(-1)[:n]
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


@lru_cache(maxsize=2)
def _epoch_visits(source: Mixture, *, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled: the ids that an epoch visits, and which visit of the id each is."""
    ids, repeats = source.epoch(seed=seed, epoch=epoch)
    order = epoch_order(len(ids), seed=seed, epoch=epoch)
    return ids[order], repeats[order]


def batch_ids(
    source: Mixture, *, seed: int, step: int, batch_size: int, skipped: Collection[int] = ()
) -> tuple[int, np.ndarray, np.ndarray]:
    """The epoch of global step `step`, the image ids of its global batch, and which visit of the epoch each one is.

    An epoch has source.visits // batch_size steps. The source.visits % batch_size images left over are other ones
    each epoch. In the place of a skipped image stands the one half an epoch further on (the first from there that is
    not skipped, around the end): it is hardly ever in the same batch, and its crop is drawn anew.

    Returns:
        epoch; ids, int64 [batch_size]; repeats, int64 [batch_size], 0 for the first visit.

    Raises:
        UserError: a batch is larger than an epoch, or every image is skipped.
    """
    n = source.visits
    if batch_size > n:
        raise UserError(f"batch_size={batch_size} is larger than the {n} images of an epoch; lower it to at most {n}")
    epoch, at = divmod(step, n // batch_size)
    ids, repeats = _epoch_visits(source, seed=seed, epoch=epoch)
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


def crop_windows(
    ids: np.ndarray,
    sizes: np.ndarray,
    *,
    seed: int,
    epoch: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    repeats: np.ndarray | int = 0,
    view: int = 0,
) -> np.ndarray:
    """Random resized crops: int32 windows [b, 4] of (top, left, height, width) in pixels, inside the image.

    As `torchvision.transforms.RandomResizedCrop` defines them (Szegedy et al., 2015): an area uniform in
    `scale` times the image's, an aspect ratio width / height log-uniform in `ratio`, a uniform position;
    after ten windows that do not fit, the largest central one within `ratio`.

    Args:
        ids: int64 [b]; the only thing, with seed, epoch and repeats, that the draws depend on.
        sizes: int32 [b, 2], height and width of these images.
        repeats: int64 [b], which visit of the image in this epoch it is, 0 for the first.
        view: which of several views of that visit, below MAX_VIEWS.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    low, high = ratio
    repeats = np.broadcast_to(repeats, ids.shape)
    h = np.where(width < height * low, np.rint(width / low), height)
    w = np.where(width > height * high, np.rint(height * high), width)
    windows = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
    open_ = np.arange(len(ids))
    for attempt in range(_CROP_ATTEMPTS):
        words = _draw(ids[open_], 16 * view + attempt, seed=seed, epoch=epoch, stream=_CROP, repeats=repeats[open_])
        u = _uniform(words)
        area = height[open_] * width[open_] * (scale[0] + u[:, 0] * (scale[1] - scale[0]))
        aspect = np.exp(np.log(low) + u[:, 1] * (np.log(high) - np.log(low)))
        w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (w >= 1) & (h >= 1) & (w <= width[open_]) & (h <= height[open_])
        top, left = np.floor(u[:, 2] * (height[open_] - h + 1)), np.floor(u[:, 3] * (width[open_] - w + 1))
        windows[open_[fits]] = np.stack([top, left, h, w], axis=1)[fits]
        open_ = open_[~fits]
        if not len(open_):
            break
    return windows.astype(np.int32)


def flip_flags(ids: np.ndarray, *, seed: int, epoch: int, repeats: np.ndarray | int = 0, view: int = 0) -> np.ndarray:
    """Whether each image is mirrored left to right, bool [len(ids)], with probability 1/2."""
    return _draw(ids, 16 * view, seed=seed, epoch=epoch, stream=_FLIP, repeats=repeats)[:, 0] >= 2**31


@dataclass(frozen=True, kw_only=True)
class Photometric:
    """How strong and how likely photometric changes are; the defaults change nothing.

    SimCLR's recipe as refined by BYOL (Grill et al., 2020, appendix B), which MoCo v3, DINO and VICReg follow. In this
    order: colour jitter, grayscale, blur, solarise. Probabilities that may differ by view hold one number for all views
    or one per view.
    """

    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Brightness, contrast and saturation: factors uniform in [max(0, 1 - x), 1 + x]. Hue: [-x, x] turns."""
    color_jitter_p: float = 0.8
    grayscale_p: float = 0.0
    blur_p: tuple[float, ...] = (0.0,)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Pixels of the resized crop, uniform; the kernel reaches ceil(3 sigma) pixels far."""
    solarize_p: tuple[float, ...] = (0.0,)

    def draw(
        self, ids: np.ndarray, *, seed: int, epoch: int, view: int, repeats: np.ndarray | int = 0
    ) -> dict[str, np.ndarray]:
        """What happens to view `view` of images `ids`; an operation that no image can get is left out.

        Without clipping, brightness, contrast about the mean grey level, saturation and hue commute, as the first two
        scale and shift all channels alike and the others only touch chroma. So the jitter has no order, unlike
        torchvision's that shuffles them, and it is one matrix, like grayscale, which takes all chroma away:

            x -> color x + lift * (mean grey level of the image)

        Returns:
            color: float32 [b, 3, 3]; lift: float32 [b].
            sigma: float32 [b] in pixels; window: int32 [b], the kernel's width, 1 where nothing is blurred.
            unsolarized: uint8 [b], 0 where values from 128 on are inverted, else 255.
        """
        blocks = [
            _draw(ids, 16 * view + block, seed=seed, epoch=epoch, stream=_PHOTO, repeats=repeats) for block in range(3)
        ]
        u = _uniform(np.concatenate(blocks, axis=1)).T
        blur_p, solarize_p = (p[view if len(p) > 1 else 0] for p in (self.blur_p, self.solarize_p))
        drawn: dict[str, np.ndarray] = {}
        jitters = any(self.color_jitter) and self.color_jitter_p > 0
        if jitters or self.grayscale_p > 0:
            changed = (u[0] < self.color_jitter_p) & jitters
            low = np.maximum(0, 1 - np.array(self.color_jitter[:3]))[:, None]
            factors = low + u[1:4] * (1 + np.array(self.color_jitter[:3])[:, None] - low)
            brightness, contrast, saturation = np.where(changed, factors, 1.0)
            saturation = np.where(u[5] < self.grayscale_p, 0.0, saturation)
            angle = np.where(changed, (2 * u[4] - 1) * self.color_jitter[3] * 2 * np.pi, 0.0)
            along, across = (x[:, None, None] for x in (saturation * np.cos(angle), saturation * np.sin(angle)))
            gain = (brightness * contrast)[:, None, None]
            drawn["color"] = (gain * (_GREY + along * _CHROMA + across * _TURNED)).astype(np.float32)
            drawn["lift"] = (brightness * (1 - contrast)).astype(np.float32)
        if blur_p > 0:
            sigma = self.blur_sigma[0] + u[7] * (self.blur_sigma[1] - self.blur_sigma[0])
            drawn["sigma"] = sigma.astype(np.float32)
            drawn["window"] = np.where(u[6] < blur_p, 2 * np.ceil(3 * sigma) + 1, 1).astype(np.int32)
        if solarize_p > 0:
            drawn["unsolarized"] = np.where(u[8] < solarize_p, 0, 255).astype(np.uint8)
        return drawn
