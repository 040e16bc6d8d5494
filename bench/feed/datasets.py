"""Datasets for torch's DataLoader, one per decoder: every item is a random resized crop of one image."""

from __future__ import annotations

import abc
import functools
import importlib
import io
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from bench.feed.images import Images

SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)  # the reference recipe
MEAN, STD = np.array([0.485, 0.456, 0.406], dtype="f4"), np.array([0.229, 0.224, 0.225], dtype="f4")


class Endless(Sampler[int]):
    """Random orders one after another: no worker starts anew between epochs."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self._count).tolist()


def random_window(height: int, width: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random resized crop (Szegedy et al., 2015; torchvision's definition)."""
    for _ in range(10):
        area = height * width * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resized(image: Tensor, window: tuple[int, int, int, int], size: int) -> Tensor:
    """Crop uint8 [1, 3, H, W] to a window and resize it with torch's antialiased kernel, as torchvision does.

    On a GPU the kernel takes no bytes, so the crop is converted.
    """
    top, left, h, w = window
    crop = image[:, :, top : top + h, left : left + w]
    crop = crop.float() if image.is_cuda else crop
    resized = torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)
    return resized.round().to(torch.uint8) if image.is_cuda else resized


class Files(Dataset[Any], abc.ABC):
    """Image files; `view` makes a training view of each."""

    def __init__(self, images: Images) -> None:
        self.size = images.size
        self.paths = list(map(str, sorted((images.files / "all").iterdir())))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        with open(self.paths[i], "rb") as file:
            return self.view(file.read())

    @abc.abstractmethod
    def view(self, encoded: bytes) -> Any:
        """Return float32 [3, size, size], normalised, or uint8 [size, size, 3]."""


class Pillow(Files):
    """The reference recipe."""

    def view(self, encoded: bytes) -> Tensor:
        from PIL import Image

        with Image.open(io.BytesIO(encoded)) as image:
            return self.recipe(image.convert("RGB"))

    def recipe(self, image: Any) -> Tensor:
        pixels = _pillow_crop(image, self.size)
        scaled = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = (torch.from_numpy(v)[:, None, None] for v in (MEAN, STD))
        return scaled.sub_(mean).div_(std)


class PillowBytes(Files):
    """The reference recipe without normalisation, which is left to the model."""

    def view(self, encoded: bytes) -> np.ndarray:
        from PIL import Image

        with Image.open(io.BytesIO(encoded)) as image:
            return _pillow_crop(image.convert("RGB"), self.size)


def _pillow_crop(image: Any, size: int) -> np.ndarray:
    from PIL import Image

    top, left, h, w = random_window(image.height, image.width)
    crop = image.crop((left, top, left + w, top + h))
    return np.array(crop.resize((size, size), Image.Resampling.BILINEAR))


class PillowTuples(Files):
    """Whole images, for FFCV's writer."""

    def view(self, encoded: bytes) -> tuple[Any]:
        from PIL import Image

        return (Image.open(io.BytesIO(encoded)).convert("RGB"),)


class HuggingFace(Dataset[Tensor]):
    def __init__(self, images: Images) -> None:
        datasets = importlib.import_module("datasets")
        datasets.disable_progress_bars()
        found = datasets.Dataset.from_parquet(str(images.parquet), cache_dir=str(images.folder / "huggingface"))
        recipe = Pillow(images).recipe
        self._images = found.cast_column("image", datasets.Image()).with_transform(
            lambda batch: {"image": [recipe(image.convert("RGB")) for image in batch["image"]]}
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> Tensor:
        return self._images[i]["image"]

    def __getitems__(self, ids: list[int]) -> list[Tensor]:  # a DataLoader prefers this
        return self._images[ids]["image"]


class TorchvisionPillow(Files):
    def __init__(self, images: Images) -> None:
        super().__init__(images)
        transforms = importlib.import_module("torchvision.transforms.v2")
        self._transform = transforms.Compose([
            transforms.RandomResizedCrop(self.size, scale=SCALE, ratio=RATIO), transforms.PILToTensor(),
            transforms.ToDtype(torch.float32, scale=True), transforms.Normalize(MEAN.tolist(), STD.tolist()),
        ])  # fmt: skip

    def view(self, encoded: bytes) -> Tensor:
        from PIL import Image

        with Image.open(io.BytesIO(encoded)) as image:
            return self._transform(image.convert("RGB"))


class TorchvisionTensors(Files):
    """Decoded and resized as tensors."""

    def __init__(self, images: Images) -> None:
        super().__init__(images)
        io_module, transforms = (importlib.import_module(f"torchvision.{m}") for m in ("io", "transforms.v2"))
        self._decode = functools.partial(io_module.decode_jpeg, mode=io_module.ImageReadMode.RGB)
        self._crop = transforms.RandomResizedCrop(self.size, scale=SCALE, ratio=RATIO, antialias=True)

    def view(self, encoded: bytes) -> Tensor:
        return self._crop(self._decode(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))).permute(1, 2, 0)


class OpenCV(Files):
    """OpenCV: INTER_AREA, its antialiased mode, where an image shrinks."""

    def view(self, encoded: bytes) -> np.ndarray:
        import cv2  # pyright: ignore[reportMissingImports]

        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        top, left, h, w = random_window(*pixels.shape[:2])
        how = cv2.INTER_AREA if min(h, w) > self.size else cv2.INTER_LINEAR
        return cv2.resize(pixels[top : top + h, left : left + w], (self.size, self.size), interpolation=how)


class _Decoded(Files):
    """libjpeg-turbo's pixels, then torch's resize."""

    @abc.abstractmethod
    def decode(self, encoded: bytes) -> np.ndarray:
        """uint8 [height, width, 3]."""

    def view(self, encoded: bytes) -> Tensor:
        pixels = torch.from_numpy(self.decode(encoded))
        return resized(pixels.permute(2, 0, 1)[None], random_window(*pixels.shape[:2]), self.size)[0].permute(1, 2, 0)


class SimpleJpeg(_Decoded):
    def decode(self, encoded: bytes) -> np.ndarray:
        return importlib.import_module("simplejpeg").decode_jpeg(encoded, "RGB")


class TurboJpeg(_Decoded):
    def __init__(self, images: Images) -> None:
        super().__init__(images)
        turbojpeg = importlib.import_module("turbojpeg")
        self._decoder, self._rgb = turbojpeg.TurboJPEG(), turbojpeg.TJPF_RGB

    def decode(self, encoded: bytes) -> np.ndarray:
        return self._decoder.decode(encoded, pixel_format=self._rgb)
