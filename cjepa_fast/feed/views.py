"""The views of an image: crop windows, flips and photometric changes. Pure functions of (seed, epoch, image id).

Nothing here looks at a pixel or knows of DALI, which applies the draws (`feed.decode`).

Legend: b images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cjepa_fast.config import DataConfig
from cjepa_fast.feed.order import CROP, FLIP, PHOTO, Visits, draw

CROP_RATIO = (3 / 4, 4 / 3)  # width over height; Szegedy et al., 2015, and torchvision's RandomResizedCrop
MAX_VIEWS = 16  # of an image; a view has 16 of the 256 counters of a visit
_CROP_ATTEMPTS = 10  # torchvision.transforms.RandomResizedCrop

# Luma, and the two chroma axes, of RGB: YIQ of NTSC, as in DALI's colour operators.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_GREY = np.tile(_YIQ[0], (3, 1))
_CHROMA = np.eye(3) - _GREY
_QUARTER = np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]])  # turn of chroma, from red towards green
_TURNED = np.linalg.inv(_YIQ) @ _QUARTER @ _YIQ


class Views(NamedTuple):
    """The views that are made of each image."""

    image_size: int  # side in pixels
    count: int = 1
    independent: bool = False  # each view has its own crop and flip, not only its own colours (LiDAR, Thilak 2023)

    @property
    def windows(self) -> int:
        """The number of views with a crop of their own; the others share that of view 0."""
        return self.count if self.independent else 1


@dataclass(frozen=True, kw_only=True)
class Photometric:
    """Strength and probability of photometric changes; the defaults change nothing.

    In this order: colour jitter, greyscale, blur, solarise. A probability for each view may be given, or one for all;
    views beyond the last number share it.
    """

    color_jitter: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    """Brightness, contrast and saturation: factors uniform in [max(0, 1 - x), 1 + x]. Hue: [-x, x] turns."""
    color_jitter_p: float = 0.8
    grayscale_p: float = 0.0
    blur_p: tuple[float, ...] = (0.0,)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Pixels of the resized crop, uniform; the kernel reaches ceil(3 sigma) pixels far."""
    solarize_p: tuple[float, ...] = (0.0,)

    def draw(self, visits: Visits, view: int = 0) -> dict[str, np.ndarray]:
        """Draw the changes of one view; an impossible change is left out.

        Brightness and contrast scale and shift all channels alike, saturation and hue touch chroma alone. So without
        clipping they commute, and the jitter is one matrix without an order, unlike torchvision's. Greyscale, which
        removes all chroma, is part of the matrix:

            x -> color x + lift * (mean grey level of the image)

        Returns:
            color: float32 [b, 3, 3]; lift: float32 [b].
            sigma: float32 [b] in pixels; window: int32 [b], the kernel's width, 1 where nothing is blurred.
            unsolarized: uint8 [b], 0 where values from 128 on are inverted, else 255.
        """
        u = _uniform(np.concatenate([draw(visits, PHOTO, 16 * view + block) for block in range(3)], axis=1)).T
        blur_p, solarize_p = (p[min(view, len(p) - 1)] for p in (self.blur_p, self.solarize_p))
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


# BYOL's recipe (Grill et al., 2020, appendix B), which MoCo v3, DINO and VICReg follow. "color" leaves out blur and
# solarise, as SimCLR (Chen et al., 2020, appendix B.9) does on CIFAR-10.
_COLOR = Photometric(color_jitter=(0.4, 0.4, 0.2, 0.1), color_jitter_p=0.8, grayscale_p=0.2)
AUGMENTS = {
    "none": Photometric(),
    "color": _COLOR,
    "byol": replace(_COLOR, blur_p=(1.0, 0.1), solarize_p=(0.0, 0.2)),
}


def photometric(data: DataConfig) -> Photometric:
    """Return the recipe of data.augment, its jitter scaled by data.augment_strength."""
    recipe = AUGMENTS[data.augment]
    return replace(recipe, color_jitter=tuple(data.augment_strength * x for x in recipe.color_jitter))


def draw_views(
    data: DataConfig, recipe: Photometric, views: Views, visits: Visits, sizes: np.ndarray
) -> dict[str, np.ndarray]:
    """Draw all views of images of `sizes`, int32 [b, 2]: contiguous arrays [b, ...] by name.

    Names end with the view: "anchor v" and "shape v" of the crop window, "flip v", and those of `Photometric.draw`.
    """
    drawn: dict[str, np.ndarray] = {}
    for view in range(views.count):
        if view < views.windows:
            windows = crop_windows(visits, sizes, data.crop_scale, view)
            drawn[f"anchor {view}"], drawn[f"shape {view}"] = windows[:, :2], windows[:, 2:]
            if data.hflip:
                drawn[f"flip {view}"] = flip_flags(visits, view).astype(np.int32)
        drawn |= {f"{name} {view}": value for name, value in recipe.draw(visits, view).items()}
    return {name: np.ascontiguousarray(value) for name, value in drawn.items()}


def crop_windows(visits: Visits, sizes: np.ndarray, scale: tuple[float, float], view: int = 0) -> np.ndarray:
    """Draw random resized crops: int32 windows [b, 4] of (top, left, height, width) in pixels, inside the image.

    The definition is that of `torchvision.transforms.RandomResizedCrop` (Szegedy et al., 2015). The area is uniform in
    `scale` times the image's, the aspect ratio log-uniform in CROP_RATIO, the position uniform. After ten windows that
    do not fit comes the largest central one within CROP_RATIO.

    Args:
        sizes: int32 [b, 2], height and width of the images.
        view: below MAX_VIEWS.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    low, high = CROP_RATIO
    h = np.where(width < height * low, np.rint(width / low), height)
    w = np.where(width > height * high, np.rint(height * high), width)
    windows = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
    open_ = np.arange(len(sizes))
    for attempt in range(_CROP_ATTEMPTS):
        u = _uniform(draw(visits.at(open_), CROP, 16 * view + attempt))
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


def flip_flags(visits: Visits, view: int = 0) -> np.ndarray:
    """Draw with probability 1/2 whether each image is mirrored left to right: bool [b]."""
    return draw(visits, FLIP, 16 * view)[:, 0] >= 2**31


def _uniform(words: np.ndarray) -> np.ndarray:
    """Convert uint32 words to float64 in the open interval (0, 1)."""
    return (words + 0.5) * 2.0**-32
