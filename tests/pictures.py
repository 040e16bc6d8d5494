"""Test pictures, and batches of them."""

from __future__ import annotations

import importlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cjepa_fast.config import DataConfig
from cjepa_fast.feed import batches as feed
from cjepa_fast.feed.bad import BadImages
from cjepa_fast.feed.batches import Batches
from cjepa_fast.feed.decode import Place
from cjepa_fast.feed.index import open_sources
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.feed.order import Order
from cjepa_fast.feed.views import AUGMENTS, Photometric, Views

SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Return a smooth colourful image: noise would measure how decoders differ in their last bit."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def opened(*roots: object) -> Mixture:
    return open_sources(list(map(str, roots)))


def fifty(root: Path) -> Mixture:
    """Return 50 images of many sizes in two classes."""
    rng = np.random.default_rng(0)
    for i in range(50):
        folder = root / ("even", "odd")[i % 2]
        folder.mkdir(exist_ok=True)
        height, width = rng.integers(20, 90, 2)
        picture(i, int(height), int(width)).save(folder / f"{i}.jpg", quality=90)
    return opened(root)


def packed(source: Mixture, root: Path, kind: str) -> Path:
    """Write the images of `source`, in the same order, as another kind of source; return its root."""
    if kind == "tar":
        for start in (0, 30):
            with tarfile.open(root / f"train-{start:02d}.tar", "w") as shard:
                for i in range(start, min(start + 30, len(source))):
                    shard.add(source.path(i), f"{i:03d}.jpg")
        return root
    if kind == "list":
        (root / "list.txt").write_text("".join(source.path(i) + "\n" for i in range(len(source))))
        return root / "list.txt"
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: parquet is not tested")
    parquet = importlib.import_module("pyarrow.parquet")
    images = [{"bytes": Path(source.path(i)).read_bytes(), "path": None} for i in range(len(source))]
    parquet.write_table(pyarrow.table({"image": images}), root / "a.parquet", row_group_size=7)
    return root / "a.parquet"


def batches(
    source: Mixture,
    *,
    image_size: int = 24,
    views: int = 1,
    independent: bool = False,
    batch_size: int = 16,
    first_step: int = 0,
    last_step: int | None = 7,  # two epochs of three steps and one more
    crop_scale: tuple[float, float] = SCALE,
    hflip: bool = True,
    photometric: Photometric | None = None,
    prefetch: int = 2,
    bad: BadImages | None = None,
    **place,
) -> Batches:
    """Return batches of seed 3; `photometric` replaces a recipe of `data.augment`, `prefetch` the constant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "PREFETCH", prefetch)
        patch.setitem(AUGMENTS, "none", photometric or AUGMENTS["none"])
        return Batches(
            source,
            DataConfig(crop_scale=crop_scale, hflip=hflip),
            Views(image_size, views, independent),
            Order(3, batch_size, first_step, last_step),
            Place(**place),
            bad,
        )


def center(source: Mixture, ids: np.ndarray, image_size: int, batch_size: int, bad: BadImages | None = None) -> list:
    """Return the evaluation views."""
    return list(feed.center_batches(source, ids, image_size, batch_size, Place(), bad))


def pillow_view(path: str, window: np.ndarray, image_size: int) -> np.ndarray:
    top, left, height, width = (int(v) for v in window)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    crop = upright.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((image_size, image_size), Image.Resampling.BILINEAR))


def images_by_step(source: Mixture, **changes) -> dict[int, tuple[list[int], torch.Tensor]]:
    return {batch.step: (batch.ids.tolist(), batch.images) for batch in batches(source, **changes)}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for step in a:
        assert a[step][0] == b[step][0] and torch.equal(a[step][1], b[step][1]), step


def over_ranks(source: Mixture, world_size: int, **changes) -> dict[int, tuple[list[int], torch.Tensor]]:
    """Return the batches of all ranks, concatenated."""
    ranks = [images_by_step(source, rank=rank, world_size=world_size, **changes) for rank in range(world_size)]
    return {step: ([i for r in ranks for i in r[step][0]], torch.cat([r[step][1] for r in ranks])) for step in ranks[0]}
