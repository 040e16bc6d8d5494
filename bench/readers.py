"""Ways from encoded images to training batches: ours and its rivals, each as an endless stream.

All of them do the reference recipe's work: a random resized crop (scale 0.3 to 1, ratio 3/4 to 4/3) of every image in
a random order, resized bilinearly with antialias. What they hand over differs, and `delivers` says it: the recipe gives
normalised float32, ours gives uint8, as the patch embedding normalises. Rivals written here give uint8 where that is
cheaper for them. The same images lie ready as files, tar shards and parquet, and each reads what suits it.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
import importlib.util
import io
import math
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cjepa_fast.config import DataConfig
from cjepa_fast.errors import UserError
from cjepa_fast.feed import decode
from cjepa_fast.feed.batches import Batches
from cjepa_fast.feed.images import FORMATS
from cjepa_fast.feed.index import open_sources
from cjepa_fast.feed.order import Order
from cjepa_fast.feed.views import Views

SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)  # the reference recipe
MEAN, STD = np.array([0.485, 0.456, 0.406], dtype="f4"), np.array([0.229, 0.224, 0.225], dtype="f4")
LOADS = (0.0, 0.5, 0.65, 0.8, 1.0)  # shares of the hardware decoder to try
UINT8, FLOAT = "uint8 NHWC", "float32 NCHW"


# --- what is read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """JPEGs laid out as every reader wants them, below `folder`."""

    name: str  # "imagenet", or "synthetic 500x375"
    size: int  # pixels a side of what is made of them
    batch_size: int
    count: int
    folder: Path

    @property
    def files(self) -> Path:
        """A folder with one class folder."""
        return self.folder / "files"

    @property
    def shards(self) -> list[str]:
        return sorted(map(str, (self.folder / "shards").glob("*.tar")))

    @property
    def parquet(self) -> Path:
        return self.folder / "images.parquet"


def lay_out(
    encoded: list[bytes], folder: Path, *, name: str, size: int, batch_size: int, shards: int
) -> Images:  # fmt: skip
    """Writes the same JPEGs as files, as tar shards and, where pyarrow is installed, as parquet."""
    (folder / "files" / "all").mkdir(parents=True)
    (folder / "shards").mkdir()
    for i, data in enumerate(encoded):
        (folder / "files" / "all" / f"{i:06d}.jpg").write_bytes(data)
    for k in range(shards):
        with tarfile.open(folder / "shards" / f"{k:03d}.tar", "w") as shard:
            for i in range(k, len(encoded), shards):
                member = tarfile.TarInfo(f"{i:06d}.jpg")
                member.size = len(encoded[i])
                shard.addfile(member, io.BytesIO(encoded[i]))
    images = Images(name=name, size=size, batch_size=batch_size, count=len(encoded), folder=folder)
    if importlib.util.find_spec("pyarrow"):
        pyarrow, parquet = (importlib.import_module(m) for m in ("pyarrow", "pyarrow.parquet"))
        column = [{"bytes": data, "path": None} for data in encoded]
        parquet.write_table(pyarrow.table({"image": column}), images.parquet, row_group_size=100)
    return images


def read_jpegs(root: str, limit: int) -> list[bytes]:
    """Up to `limit` JPEGs, spread over whatever source `root` is; shuffled, as shards must be."""
    source = open_sources([root])
    formats = np.concatenate([manifest.entries["format"] for manifest in source.manifests])
    jpegs = np.flatnonzero(formats == FORMATS.index("JPEG"))
    if not len(jpegs):
        raise UserError(f"{root}: holds no JPEG, and JPEGs are what is timed")
    chosen = jpegs[np.linspace(0, len(jpegs) - 1, min(limit, len(jpegs))).astype(int)]
    return [source.read(int(i)) for i in np.random.default_rng(0).permutation(chosen)]


def synthetic_jpegs(height: int, width: int, count: int) -> list[bytes]:
    """Coloured shapes under grain, made by Pillow; about 110 kB at 375 x 500, as the mean of ImageNet."""
    from PIL import Image

    rng, encoded = np.random.default_rng(0), []
    for _ in range(count):
        coarse = rng.integers(0, 256, (4, 5, 3)) + np.array([30, 0, -30]) + np.linspace(40, -40, 4)[:, None, None]
        picture = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 25, (height, width, 1))
        pixels = (np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        encoded.append(file.getvalue())
    return encoded


# --- how it is read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """One way to make batches.

    open: an endless stream of batches as `delivers` says; closing it ends whatever works for it.
    role: "ours" or "rival".
    needs: modules that must be installed.
    """

    name: str
    open: Callable[[Images, int], Iterator[Tensor]]  # takes the number of threads or worker processes
    role: str = "rival"
    delivers: str = UINT8
    needs: tuple[str, ...] = ()
    threads: int | None = None  # a number of its own, in a sweep

    @property
    def obstacle(self) -> str | None:
        absent = [module for module in self.needs if not _installed(module)]
        return f"not installed: {', '.join(absent)}" if absent else None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that would hold it
        return False


def readers(device: str, threads: int) -> list[Reader]:
    """All of them, ours first. With device "cuda" all batches land there."""
    torch_rivals = {
        "Pillow, torch DataLoader": (Pillow, FLOAT, ("PIL",)),
        "torchvision on Pillow images": (TorchvisionPillow, FLOAT, ("torchvision", "PIL")),
        "torchvision decode_jpeg": (TorchvisionTensors, UINT8, ("torchvision",)),
        "OpenCV": (OpenCV, UINT8, ("cv2",)),
        "simplejpeg": (SimpleJpeg, UINT8, ("simplejpeg",)),
        "PyTurboJPEG": (TurboJpeg, UINT8, ("turbojpeg",)),
        "Hugging Face datasets": (HuggingFace, FLOAT, ("datasets", "pyarrow", "PIL")),
    }
    dali = ("nvidia.dali",)
    found = []
    if device == "cuda":
        found += [
            Reader(name=f"ours, GPU, hardware share {load:g}, {n} threads", role="ours", threads=n,
                   open=functools.partial(ours, device="cuda:0", load=load), needs=dali)
            for n, load in sweep(threads)
        ]  # fmt: skip
        found += [
            Reader(name="DALI's own reader, GPU", open=functools.partial(dali_alone, device="mixed"), needs=dali),
            Reader(name="torchvision decode_jpeg, GPU", open=torchvision_gpu, needs=("torchvision",)),
        ]
    found += [
        Reader(name="ours, CPU", open=ours, role="ours", needs=dali),
        Reader(name="ours, CPU, tar shards", open=functools.partial(ours, shards=True), role="ours", needs=dali),
        Reader(name="DALI's own reader, CPU", open=functools.partial(dali_alone, device="cpu"), needs=dali),
        *(
            Reader(name=name, open=functools.partial(loader, dataset, device), delivers=delivers, needs=needs)
            for name, (dataset, delivers, needs) in torch_rivals.items()
        ),
        Reader(name="webdataset", open=functools.partial(webdataset, device), delivers=FLOAT,
               needs=("webdataset", "PIL")),
        Reader(name="FFCV", open=functools.partial(ffcv, device), needs=("ffcv",)),
    ]  # fmt: skip
    return found


def sweep(threads: int) -> list[tuple[int, float]]:
    """(threads, hardware share): every share at the most threads, and the default share at fewer."""
    fewer = [n for n in (2, 4, 8) if n < threads]
    return [*((threads, load) for load in LOADS), *((n, 0.65) for n in fewer)]


def ours(
    images: Images, threads: int, *, device: str = "cpu", load: float = 0.65, shards: bool = False
) -> Iterator[Tensor]:  # fmt: skip
    decode.HW_DECODER_LOAD = load  # a constant of the library, which the sweep checks
    batches = Batches(
        open_sources([str(images.folder / "shards") if shards else str(images.files)]), DataConfig(crop_scale=SCALE),
        Views(images.size), Order(0, images.batch_size), decode.Place(device=device, threads=threads),
    )  # fmt: skip
    try:
        for batch in batches:
            yield batch.images
    finally:
        batches.close()


def dali_alone(images: Images, threads: int, *, device: str) -> Iterator[Tensor]:
    """DALI as its own examples use it: it reads, shuffles and draws the crops."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    bilinear: Any = types.INTERP_TRIANGULAR  # pyright: ignore[reportAttributeAccessIssue]
    pipeline = Pipeline(batch_size=images.batch_size, num_threads=threads, prefetch_queue_depth=2,
                        device_id=None if device == "cpu" else 0)  # fmt: skip
    with pipeline:
        encoded, _ = fn.readers.file(
            file_root=str(images.files), random_shuffle=True, initial_fill=images.count, name="r"
        )
        decoded = fn.decoders.image_random_crop(
            encoded, device=device, random_area=list(SCALE), random_aspect_ratio=list(RATIO)
        )
        size = [images.size, images.size]
        pipeline.set_outputs(fn.resize(decoded, size=size, interp_type=bilinear))
    while True:
        (batch,) = pipeline.run()
        yield torch.from_dlpack(batch.as_tensor())


def torchvision_gpu(images: Images, threads: int) -> Iterator[Tensor]:
    """Files read by threads, decoded as a list by nvJPEG, cropped and resized one by one."""
    from concurrent.futures import ThreadPoolExecutor

    from torchvision.io import decode_jpeg, read_file  # pyright: ignore[reportMissingImports]

    paths = list(map(str, sorted((images.files / "all").iterdir())))
    order = iter(Endless(images.count))
    with ThreadPoolExecutor(threads) as pool:
        while True:
            names = [paths[next(order)] for _ in range(images.batch_size)]
            decoded = decode_jpeg(list(pool.map(read_file, names)), device="cuda")
            small = [_resized(image[None], random_window(*image.shape[1:]), images.size) for image in decoded]
            yield torch.cat(small).permute(0, 2, 3, 1)


def loader(dataset: type[Files], device: str, images: Images, threads: int) -> Iterator[Tensor]:
    """A torch DataLoader over `dataset` with worker processes."""
    batches = DataLoader(
        dataset(images), batch_size=images.batch_size, sampler=Endless(images.count), num_workers=threads,
        pin_memory=device == "cuda", worker_init_fn=_one_thread, multiprocessing_context="fork",
    )  # fmt: skip
    for batch in batches:
        yield batch.to(device, non_blocking=True)


def _one_thread(_: int) -> None:
    if importlib.util.find_spec("cv2"):
        importlib.import_module("cv2").setNumThreads(0)


def webdataset(device: str, images: Images, threads: int) -> Iterator[Tensor]:
    wds = importlib.import_module("webdataset")
    dataset = wds.WebDataset(images.shards, resampled=True, nodesplitter=None, shardshuffle=False)
    dataset = dataset.shuffle(200).decode("pilrgb").to_tuple("jpg").map_tuple(Pillow(images).recipe)
    batches = wds.WebLoader(dataset.batched(images.batch_size), batch_size=None, num_workers=threads,
                            multiprocessing_context="fork")  # fmt: skip
    for (batch,) in batches:
        yield batch.to(device, non_blocking=True)


def ffcv(device: str, images: Images, threads: int) -> Iterator[Tensor]:
    """Its own file format, JPEGs kept as they are; written at the first use."""
    from ffcv.fields import RGBImageField  # pyright: ignore[reportMissingImports]
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder  # pyright: ignore[reportMissingImports]
    from ffcv.loader import Loader, OrderOption  # pyright: ignore[reportMissingImports]
    from ffcv.transforms import ToTensor  # pyright: ignore[reportMissingImports]
    from ffcv.writer import DatasetWriter  # pyright: ignore[reportMissingImports]

    path = str(images.folder / "images.beton")
    if not os.path.exists(path):
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90)}
        DatasetWriter(path, fields).from_indexed_dataset(_PillowTuples(images))
    size = (images.size, images.size)
    decoder = RandomResizedCropRGBImageDecoder(size, scale=SCALE, ratio=RATIO)
    batches = Loader(path, batch_size=images.batch_size, num_workers=threads, order=OrderOption.RANDOM, os_cache=True,
                     drop_last=True, pipelines={"image": [decoder, ToTensor()]})  # fmt: skip
    while True:
        for (batch,) in batches:
            yield batch.to(device, non_blocking=True)


# --- datasets for torch's DataLoader


class Endless(Sampler[int]):
    """One random order after another, so that no worker starts anew between epochs."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self._count).tolist()


def random_window(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random resized crop as Szegedy et al. (2015) and torchvision define it."""
    for _ in range(10):
        area = height * width * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized(image: Tensor, window: tuple[int, int, int, int], size: int) -> Tensor:
    """uint8 [1, 3, H, W] cropped to a window and resized as torchvision does it, by torch's antialiased kernel, which
    on a GPU knows no bytes.
    """
    top, left, h, w = window
    crop = image[:, :, top : top + h, left : left + w]
    crop = crop.float() if image.is_cuda else crop
    resized = torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)
    return resized.round().to(torch.uint8) if image.is_cuda else resized


class Files(Dataset[Any], abc.ABC):
    """Image files, made into one training view each by `view`."""

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
        """float32 [3, size, size], normalised, or uint8 [size, size, 3]."""


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
    """The reference recipe, normalised by whoever trains."""

    def view(self, encoded: bytes) -> np.ndarray:
        from PIL import Image

        with Image.open(io.BytesIO(encoded)) as image:
            return _pillow_crop(image.convert("RGB"), self.size)


def _pillow_crop(image: Any, size: int) -> np.ndarray:
    from PIL import Image

    top, left, h, w = random_window(image.height, image.width)
    crop = image.crop((left, top, left + w, top + h))
    return np.array(crop.resize((size, size), Image.Resampling.BILINEAR))


class _PillowTuples(Files):
    """Whole images, for a writer."""

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

    def __getitems__(self, ids: list[int]) -> list[Tensor]:  # what a DataLoader prefers
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
    """INTER_AREA where it shrinks, the antialias that OpenCV has."""

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
        return _resized(pixels.permute(2, 0, 1)[None], random_window(*pixels.shape[:2]), self.size)[0].permute(1, 2, 0)


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
