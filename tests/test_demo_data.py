from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cjepa_fast.feed.demo import CLASSES, IMAGE_SIZE, write_demo_dataset

TRAIN, TEST = 60, 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    write_demo_dataset(root, train_per_class=TRAIN, test_per_class=TEST)
    return root


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


def load(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels [n, H, W, 3] in [0, 1] and labels [n]."""
    paths = sorted((root / split).rglob("*.jpg"))
    images = np.stack([np.asarray(Image.open(path)) for path in paths]) / 255
    return images, np.array([CLASSES.index(path.parent.name) for path in paths])


def knn_accuracy(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> float:
    """Return 20-NN accuracy after standardising each feature, so that all weigh alike."""
    scale = bank.std(0) + 1e-9
    distance = (((queries[:, None] - bank[None]) / scale) ** 2).sum(-1)
    nearest = labels[np.argsort(distance, 1)[:, :20]]
    votes = (nearest[..., None] == np.arange(len(CLASSES))).sum(1)
    return float((votes.argmax(1) == truth).mean())


def test_layout_and_sizes(root: Path) -> None:
    expected = {
        f"{split}/{name}/{i:05d}.jpg"
        for split, n in (("train", TRAIN), ("test", TEST))
        for name in CLASSES
        for i in range(n)
    }
    assert set(files(root)) == expected
    for path in root.rglob("00000.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (IMAGE_SIZE, IMAGE_SIZE))


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_demo_dataset(tmp_path / name, train_per_class=2, test_per_class=1, seed=seed)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert not set(a.values()) & set(c.values())


def test_no_image_occurs_twice(root: Path) -> None:
    images = list(files(root).values())
    assert len(set(images)) == len(images) == len(CLASSES) * (TRAIN + TEST)


def test_fewer_images_are_the_first_of_more(root: Path, tmp_path: Path) -> None:
    write_demo_dataset(tmp_path, train_per_class=1, test_per_class=3)
    assert files(tmp_path).items() < files(root).items()


@pytest.mark.parametrize("statistic", ["mean and std of colour", "histogram"])
def test_trivial_statistics_do_not_give_the_class_away(root: Path, statistic: str) -> None:
    def features(images: np.ndarray) -> np.ndarray:
        if statistic == "histogram":
            grey = np.sort(images.mean(-1).reshape(len(images), -1), axis=1)
            return grey[:, :: IMAGE_SIZE * IMAGE_SIZE // 16]  # 16 quantiles of lightness
        return np.concatenate([images.mean((1, 2)), images.std((1, 2))], 1)

    (bank, labels), (queries, truth) = load(root, "train"), load(root, "test")
    accuracy = knn_accuracy(features(bank), labels, features(queries), truth)
    # Chance is 10 %; four standard errors of 200 queries are 8.5 points.
    assert accuracy < 0.185


def test_the_layout_tells_the_class(root: Path) -> None:
    """Control of the test above: the same probe sees the class in a 6 x 6 picture."""

    def features(images: np.ndarray) -> np.ndarray:
        side = IMAGE_SIZE // 6
        return images.reshape(len(images), 6, side, 6, side, 3).mean((2, 4, 5)).reshape(len(images), -1)

    (bank, labels), (queries, truth) = load(root, "train"), load(root, "test")
    assert knn_accuracy(features(bank), labels, features(queries), truth) > 0.5
