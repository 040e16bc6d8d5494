"""Views: crops, flips and photometric changes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cjepa_fast.config import DataConfig
from cjepa_fast.feed import views
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.feed.order import PHOTO, Visits, draw
from cjepa_fast.feed.views import AUGMENTS, Photometric, Views, crop_windows, draw_views, flip_flags, photometric
from pictures import RATIO, SCALE, batches, opened, picture

pytestmark = pytest.mark.usefixtures("cache")


def slow_window(height: int, width: int, scale, ratio, rng: random.Random) -> tuple[int, int, int, int]:
    """Draw a random resized crop by its published definition, one image at a time, with another generator."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def windows_of(n: int, height: int, width: int, scale=SCALE, seed: int = 1, epoch: int = 0) -> np.ndarray:
    sizes = np.tile(np.array([height, width], dtype=np.int32), (n, 1))
    return crop_windows(Visits(np.arange(n), seed, epoch), sizes, scale)


def test_crop_windows_are_pinned():
    expected = [[31, 215, 341, 260], [96, 85, 279, 343], [18, 54, 357, 359], [7, 2, 348, 438]]
    assert windows_of(4, 375, 500).tolist() == expected


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (32, 32), (64, 300), (3, 2), (1, 1)])
@pytest.mark.parametrize("scale", [SCALE, (0.05, 0.2)])
def test_crop_distribution_is_the_definition(size: tuple[int, int], scale: tuple[float, float]):
    """Compare top, left, area and aspect with the slow definition: two-sample Kolmogorov-Smirnov."""
    n = 8000
    rng = random.Random(0)
    fast = windows_of(n, *size, scale=scale)
    slow = np.array([slow_window(*size, scale, RATIO, rng) for _ in range(n)])
    assert (fast[:, :2] >= 0).all() and (fast[:, 2:] >= 1).all() and (fast[:, :2] + fast[:, 2:] <= size).all()

    def features(window: np.ndarray) -> np.ndarray:
        top, left, h, w = window.T.astype(float)
        return np.stack([top, left, h * w, np.log(w / h), h + top, w + left])

    for a, b in zip(features(fast), features(slow), strict=True):
        grid = np.union1d(a, b)
        cdf_a, cdf_b = (np.searchsorted(np.sort(x), grid, side="right") / n for x in (a, b))
        assert np.abs(cdf_a - cdf_b).max() < 2.2 * math.sqrt(2 / n)  # p < 1e-4


def test_crop_moments_are_the_analytic_ones():
    """Where every first window fits, area is uniform in scale and log aspect uniform in log ratio."""
    n, side, scale = 20000, 4000, (0.3, 0.5)
    top, left, h, w = windows_of(n, side, side, scale=scale).T.astype(float)
    area, aspect = h * w / side**2, np.log(w / h)
    half = math.log(4 / 3)
    rounding = 3e-4  # of sides around 2000 pixels to whole ones
    assert area.min() >= scale[0] - rounding and area.max() <= scale[1] + rounding
    assert abs(area.mean() - 0.4) < 4 * 0.2 / math.sqrt(12 * n)
    assert np.abs(aspect).max() <= half + 1e-3 and abs(aspect.mean()) < 4 * half / math.sqrt(3 * n)
    assert abs(aspect.std() - half / math.sqrt(3)) < 0.01 * half
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 4 / math.sqrt(n)
    for offset, room in ((top, side - h), (left, side - w)):
        assert abs((offset / room).mean() - 0.5) < 4 / math.sqrt(12 * n)


@pytest.mark.parametrize(("size", "window"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))])
def test_crop_falls_back_to_the_centre(size: tuple[int, int], window: tuple[int, ...]):
    assert (windows_of(50, *size) == window).all()


def test_crops_depend_on_seed_epoch_and_id_alone():
    base = windows_of(100, 300, 400)
    picked = np.array([70, 3, 3, 41])
    sizes = np.tile(np.array([300, 400], dtype=np.int32), (4, 1))
    assert (crop_windows(Visits(picked, 1, 0), sizes, SCALE) == base[picked]).all()
    epochs = crop_windows(Visits(picked, 1, np.array([0, 1, 0, 1])), sizes, SCALE)
    assert (epochs[::2] == base[picked[::2]]).all()
    assert (epochs[1::2] == windows_of(100, 300, 400, epoch=1)[picked[1::2]]).all()
    assert (windows_of(100, 300, 400, seed=2) != base).any(axis=1).mean() > 0.95
    assert (windows_of(100, 300, 400, epoch=1) != base).any(axis=1).mean() > 0.95
    assert len(np.unique(base, axis=0)) > 95


def test_a_second_visit_is_drawn_anew():
    """The first visit does not change if there is a second."""
    ids = np.arange(200)
    sizes = np.tile(np.array([300, 400], dtype=np.int32), (200, 1))
    visits = [Visits(ids, 1, 0, repeats) for repeats in (np.zeros(200, int), np.arange(200) % 2, 2**23)]
    windows = [crop_windows(each, sizes, SCALE) for each in visits]
    assert (windows[0] == crop_windows(Visits(ids, 1, 0), sizes, SCALE)).all()
    assert (windows[1][::2] == windows[0][::2]).all()
    flips = [flip_flags(Visits(ids, 1, 0, repeats)) for repeats in (0, 1, 2**23)]
    assert (flips[0] == flip_flags(Visits(ids, 1, 0))).all()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (windows[i][1::2] != windows[j][1::2]).any(axis=1).mean() > 0.95
        assert 60 < (flips[i] != flips[j]).sum() < 140


def test_half_of_the_images_are_flipped():
    flags = [flip_flags(Visits(np.arange(4000), 0, epoch)) for epoch in (0, 1)]
    assert all(abs(f.mean() - 0.5) < 4 / math.sqrt(4 * 4000) for f in flags)
    assert abs((flags[0] == flags[1]).mean() - 0.5) < 4 / math.sqrt(4 * 4000)


BYOL = Photometric(  # the asymmetric recipe, with solarise
    color_jitter=(0.4, 0.4, 0.2, 0.1), grayscale_p=0.2, blur_p=(1.0, 0.1), solarize_p=(0.0, 0.2)
)


def visits(n: int) -> Visits:
    return Visits(np.arange(n), 1, epoch=0)


def test_the_recipes_of_augment():
    assert {
        "none": Photometric(),
        "color": Photometric(color_jitter=(0.4, 0.4, 0.2, 0.1), color_jitter_p=0.8, grayscale_p=0.2),
        "byol": BYOL,
    } == AUGMENTS


@pytest.mark.parametrize("augment", ["none", "color", "byol"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 5.0])
def test_strength_scales_the_jitter(augment: str, strength: float):
    """Nothing else changes; without jitter, greyscale remains."""
    data, sizes = DataConfig(augment=augment, augment_strength=strength), np.full((9, 2), 30)
    drawn = draw_views(data, photometric(data), Views(24, 2), visits(9), sizes)
    jitter = tuple(strength * x for x in AUGMENTS[augment].color_jitter)
    for view in range(2):
        for name, value in replace(AUGMENTS[augment], color_jitter=jitter).draw(visits(9), view).items():
            assert (drawn.pop(f"{name} {view}") == value).all()
    assert set(drawn) == {"anchor 0", "shape 0"}


def test_photometric_draws_are_pinned():
    """These numbers may never change: a resumed run relies on them."""
    drawn = Photometric(color_jitter=(0.4, 0.4, 0.2, 0.1), color_jitter_p=1, blur_p=(1.0,), solarize_p=(0.5,)).draw(
        visits(2), view=1
    )
    expected = {
        "color": [
            [[0.8953, 0.0981, 0.0521], [0.0791, 0.9607, 0.0056], [-0.0137, 0.179, 0.8801]],
            [[0.8962, 0.0926, -0.0259], [0.0084, 0.9186, 0.0359], [0.1317, -0.0149, 0.8461]],
        ],
        "lift": [0.335, -0.0319],
        "sigma": [1.6907, 0.4955],
        "window": [13, 5],
        "unsolarized": [0, 255],
    }
    assert {name: np.round(value.astype(float), 4).tolist() for name, value in drawn.items()} == expected


def test_photometric_draws_depend_on_seed_epoch_id_visit_and_view_alone():
    ids = np.arange(300)
    base = BYOL.draw(visits(300), view=1)
    assert set(base) == {"color", "lift", "sigma", "window", "unsolarized"}
    picked = np.array([70, 3, 3, 41])
    for name, value in BYOL.draw(Visits(picked, 1, 0), view=1).items():
        assert (value == base[name][picked]).all(), name
    for others, view in ((Visits(ids, 2, 0), 1), (Visits(ids, 1, 1), 1), (Visits(ids, 1, 0, 1), 1), (visits(300), 0)):
        other = BYOL.draw(others, view)
        assert (other["color"] != base["color"]).any(axis=(1, 2)).mean() > 0.8, (others, view)
        assert (other["sigma"] != base["sigma"]).mean() > 0.99, (others, view)
    first, second = (crop_windows(visits(300), np.full((300, 2), 99), SCALE, view) for view in (0, 1))
    assert (second != first).any(axis=1).mean() > 0.95
    flips = [flip_flags(visits(300), view) for view in (0, 1)]
    assert 110 < (flips[0] != flips[1]).sum() < 190


def test_what_cannot_happen_is_not_drawn():
    assert Photometric().draw(visits(4), view=1) == {}
    assert set(BYOL.draw(visits(4), view=0)) == {"color", "lift", "sigma", "window"}
    assert set(Photometric(color_jitter=(0.4, 0, 0, 0), color_jitter_p=0).draw(visits(4), view=1)) == set()
    assert set(Photometric(grayscale_p=0.1).draw(visits(4), view=1)) == {"color", "lift"}
    assert set(Photometric(solarize_p=(0.5,)).draw(visits(4), view=1)) == {"unsolarized"}


def test_views_beyond_the_last_probability_share_it():
    second, third = (BYOL.draw(visits(2000), view) for view in (1, 2))
    assert set(second) == set(third) and abs((third["window"] > 1).mean() - 0.1) < 0.03


def test_photometric_shares_and_ranges():
    """Recover the factors from the matrices; allow four standard deviations."""
    n = 20000
    drawn = BYOL.draw(visits(n), view=1)
    color, lift = drawn["color"].astype(float), drawn["lift"].astype(float)

    def share(of: np.ndarray, p: float) -> bool:
        return abs(of.mean() - p) < 4 * math.sqrt(p * (1 - p) / n)

    grey = np.ptp(color, axis=1).max(axis=1) < 1e-6  # all rows alike
    jittered = np.abs(color.sum(axis=2)[:, 0] + lift - 1) > 1e-6  # brightness
    assert share(grey, 0.2) and share(jittered, 0.8) and share(grey & jittered, 0.16)
    assert share(drawn["unsolarized"] == 0, 0.2) and set(drawn["unsolarized"]) == {0, 255}
    assert share(drawn["window"] > 1, 0.1)
    blurred = drawn["window"] > 1
    assert (drawn["window"][blurred] == 2 * np.ceil(3 * drawn["sigma"][blurred]) + 1).all()
    untouched = ~jittered & ~grey
    assert np.abs(color[untouched] - np.eye(3)).max() < 1e-6 and not lift[untouched].any()
    gain = color[jittered].sum(axis=2)[:, 0]  # of grey pixels: brightness times contrast
    brightness = gain + lift[jittered]
    contrast = gain / brightness
    for factor, reach in ((brightness, 0.4), (contrast, 0.4), (drawn["sigma"] - 1.05 + 1, 0.95)):
        assert factor.min() >= 1 - reach - 1e-5 and factor.max() <= 1 + reach + 1e-5
        assert abs(factor.mean() - 1) < 4 * reach / math.sqrt(3 * len(factor))
        assert abs(factor.std() - reach / math.sqrt(3)) < 0.02 * reach
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 4 / math.sqrt(len(brightness))
    colorful = jittered & ~grey
    chroma = color[colorful] / color[colorful].sum(axis=2)[:, :1, None] - views._GREY
    # chroma = s (cos C + sin K), with C C = C, K K = -C and the traces of C and K 2 and 0
    along, across = (np.trace(x, axis1=1, axis2=2) / 2 for x in (chroma, -chroma @ views._TURNED))
    hue, saturation = np.arctan2(across, along) / (2 * np.pi), np.hypot(along, across)
    for factor, reach in ((saturation, 0.2), (1 + hue, 0.1)):
        assert factor.min() >= 1 - reach - 1e-5 and factor.max() <= 1 + reach + 1e-5
        assert abs(factor.mean() - 1) < 4 * reach / math.sqrt(3 * len(factor))


SIDE = 64
WHOLE = {"image_size": SIDE, "crop_scale": (1.0, 1.0), "hflip": False, "last_step": 1}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Return 24 PNG files that no crop or resize changes, some so dark or bright that colours clip."""
    root = tmp_path_factory.mktemp("squares")
    for i in range(24):
        light = (0.4, 1.0, 1.6)[i % 3]
        ImageEnhance.Brightness(picture(i, SIDE, SIDE)).enhance(light).save(root / f"{i:02d}.png")
    return opened(root)


def pixels(source: Mixture, changes: Photometric | None) -> tuple[np.ndarray, np.ndarray]:
    (batch,) = batches(source, batch_size=24, photometric=changes, **WHOLE)
    return batch.ids.numpy(), batch.images.numpy()


def distance(source: Mixture, photometric: Photometric, oracle: Callable[[Image.Image, int], Any]) -> tuple[int, float]:
    """Return the greatest and mean distance in levels to oracle(image, its place in the batch)."""
    _, before = pixels(source, None)
    _, after = pixels(source, photometric)
    expected = np.stack([np.asarray(oracle(Image.fromarray(image), k)) for k, image in enumerate(before)])
    difference = np.abs(after.astype(int) - expected)
    return int(difference.max()), float(difference.mean())


def uniforms(ids: np.ndarray) -> np.ndarray:
    words = [draw(Visits(ids, 3, 0), PHOTO, block) for block in range(3)]
    return ((np.concatenate(words, axis=1) + 0.5) / 2**32).T


@pytest.mark.parametrize(
    ("which", "enhance"), [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]
)
def test_jitter_is_pillows(squares: Mixture, which: int, enhance: Any):
    """Allow a level: Pillow cuts fractions off, the feed rounds, hence the mean of half a level."""
    jitter = (0.4 * (which == 0), 0.4 * (which == 1), 0.4 * (which == 2), 0.0)
    ids, _ = pixels(squares, None)
    factors = 0.6 + 0.8 * uniforms(ids)[1 + which]
    photometric = Photometric(color_jitter=jitter, color_jitter_p=1.0)
    most, mean = distance(squares, photometric, lambda image, k: enhance(image).enhance(factors[k]))
    assert most <= 1 and mean < 0.6


def test_jitter_at_once_is_near_torchvisions_one_after_the_other(squares: Mixture):
    """The two differ where a step clips: by 1.9 to 2.5 levels on average, with a third of the pictures glaring."""
    ids, _ = pixels(squares, None)
    u = uniforms(ids)
    factors = [0.6 + 0.8 * u[1], 0.6 + 0.8 * u[2], 0.8 + 0.4 * u[3]]
    for order in itertools.permutations(range(3)):

        def oracle(image: Image.Image, k: int, order: tuple[int, ...] = order) -> Image.Image:
            for step in order:
                kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
                image = kind(image).enhance(factors[step][k])
            return image

        most, mean = distance(squares, Photometric(color_jitter=(0.4, 0.4, 0.2, 0), color_jitter_p=1.0), oracle)
        assert mean < 3, (order, most, mean)


def test_hue_turns_chroma_in_yiq(squares: Mixture):
    """Allow a level to the definition. A third of a turn makes red green, as in Pillow's HSV."""
    ids, _ = pixels(squares, None)
    turns = (2 * uniforms(ids)[4] - 1) * 0.5
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])

    def oracle(image: Image.Image, k: int) -> np.ndarray:
        yiq = np.asarray(image) @ to_yiq.T
        chroma = (yiq[..., 1] + 1j * yiq[..., 2]) * np.exp(-2j * np.pi * turns[k])
        turned = np.stack([yiq[..., 0], chroma.real, chroma.imag], axis=-1) @ np.linalg.inv(to_yiq).T
        return np.clip(np.rint(turned), 0, 255).astype(int)

    most, mean = distance(squares, Photometric(color_jitter=(0, 0, 0, 0.5), color_jitter_p=1.0), oracle)
    assert most <= 1 and mean < 0.01
    angle = 2 * np.pi / 3
    red, green, blue = (views._GREY + np.cos(angle) * views._CHROMA + np.sin(angle) * views._TURNED) @ [1, 0, 0]
    assert green > max(red, blue) + 0.5, (red, green, blue)


def test_grayscale_is_pillows(squares: Mixture):
    most, mean = distance(squares, Photometric(grayscale_p=1.0), lambda image, _: image.convert("L").convert("RGB"))
    assert most <= 1 and mean < 0.01


def test_solarize_is_pillows(squares: Mixture):
    assert distance(squares, Photometric(solarize_p=(1.0,)), lambda image, _: ImageOps.solarize(image)) == (0, 0)


def test_blur_is_gaussian(squares: Mixture):
    """Allow a level to the definition, mirrored at the border, and five to Pillow's series of box filters."""
    photometric = Photometric(blur_p=(1.0,))
    ids, _ = pixels(squares, None)
    sigma = 0.1 + 1.9 * uniforms(ids)[7]

    def definition(image: Image.Image, k: int) -> np.ndarray:
        reach = math.ceil(3 * sigma[k])
        weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma[k] ** 2))
        padded = np.pad(np.asarray(image, float), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
        weights /= weights.sum()
        rows = np.sum([w * padded[i : i + SIDE] for i, w in enumerate(weights)], axis=0)
        return np.rint(np.sum([w * rows[:, i : i + SIDE] for i, w in enumerate(weights)], axis=0)).astype(int)

    most, mean = distance(squares, photometric, definition)
    assert most <= 1 and mean < 0.01
    most, mean = distance(
        squares, photometric, lambda image, k: image.filter(ImageFilter.GaussianBlur(float(sigma[k])))
    )
    assert most <= 5 and mean < 0.5


def test_operations_follow_in_the_order_given(squares: Mixture):
    """Grey, then blur, then solarise. Another order would show: solarise is not linear and blur rounds."""
    photometric = Photometric(grayscale_p=1.0, blur_p=(1.0,), blur_sigma=(1.5, 1.5), solarize_p=(1.0,))

    def oracle(image: Image.Image, _: int) -> Image.Image:
        grey = image.convert("L").convert("RGB")
        return ImageOps.solarize(grey.filter(ImageFilter.GaussianBlur(1.5)))

    most, mean = distance(squares, photometric, oracle)
    assert most <= 4 and mean < 0.6


def test_images_not_drawn_are_left_alone(squares: Mixture):
    """The operators run over the whole batch, but must change only drawn images."""
    ids, before = pixels(squares, None)
    rare = Photometric(color_jitter=(0.4, 0.4, 0.2, 0.1), color_jitter_p=0.3, blur_p=(0.3,), solarize_p=(0.3,))
    _, after = pixels(squares, rare)
    u = uniforms(ids)
    spared = (u[0] >= 0.3) & (u[6] >= 0.3) & (u[8] >= 0.3)
    assert 3 < spared.sum() < 20
    same = (after == before).all(axis=(1, 2, 3))
    assert (
        same[spared].all() and same[~spared].sum() <= 2
    )  # a narrow blur, or solarise where all is dark, shows nothing
