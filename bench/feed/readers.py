"""Ways from encoded images to training batches: ours and its rivals, each as an endless stream.

All do the reference recipe's work: a random resized crop (scale 0.3 to 1, ratio 3/4 to 4/3) of every image in a random
order, resized bilinearly with antialias. `Reader.delivers` names the output: normalised float32, as the recipe has it,
or uint8, which is cheaper and which our patch embedding normalises. Rivals written here give uint8 where they can.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench.feed import datasets
from bench.feed.datasets import RATIO, SCALE, Endless
from bench.feed.images import Images
from bench.training import open_feed
from cjepa_fast import config
from cjepa_fast.config.presets import PRESETS

UINT8, FLOAT = "uint8 NHWC", "float32 NCHW"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """One way to make batches.

    Attributes:
        open: opens an endless stream of batches, with so many threads or worker processes; closing it ends them.
        role: "ours" or "rival".
        delivers: type and layout of a batch.
        needs: modules that must be installed.
        threads: the reader's own number of threads, in a sweep.
    """

    name: str
    open: Callable[[Images, int], Iterator[Tensor]]
    role: str = "rival"
    delivers: str = UINT8
    needs: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def obstacle(self) -> str | None:
        """The reason why the reader cannot run here, or None."""
        absent = [module for module in self.needs if not _installed(module)]
        return f"not installed: {', '.join(absent)}" if absent else None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def readers(device: str, threads: int) -> list[Reader]:
    """List all readers, ours first. With device "cuda" all batches end there."""
    torch_rivals = {
        "Pillow, torch DataLoader": (datasets.Pillow, FLOAT, ("PIL",)),
        "torchvision on Pillow images": (datasets.TorchvisionPillow, FLOAT, ("torchvision", "PIL")),
        "torchvision decode_jpeg": (datasets.TorchvisionTensors, UINT8, ("torchvision",)),
        "OpenCV": (datasets.OpenCV, UINT8, ("cv2",)),
        "simplejpeg": (datasets.SimpleJpeg, UINT8, ("simplejpeg",)),
        "PyTurboJPEG": (datasets.TurboJpeg, UINT8, ("turbojpeg",)),
        "Hugging Face datasets": (datasets.HuggingFace, FLOAT, ("datasets", "pyarrow", "PIL")),
    }
    dali = ("nvidia.dali",)
    found = []
    if device == "cuda":
        found += [
            Reader(name=f"ours, GPU, {n} threads", role="ours", threads=n,
                   open=functools.partial(ours, device="cuda:0"), needs=dali)
            for n in (threads, *(n for n in (2, 4, 8) if n < threads))
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


def ours(images: Images, threads: int, *, device: str = "cpu", shards: bool = False) -> Iterator[Tensor]:
    """The main job's feed; this preset has the reference recipe."""
    c = config.replace(PRESETS["cjepa_vit_small16_in1k"], {"model.image_size": images.size})
    root = str(images.folder / "shards") if shards else str(images.files)
    batches = open_feed(c, [root], images.batch_size, torch.device(device), threads)
    try:
        for batch in batches:
            yield batch.images
    finally:
        batches.close()


def dali_alone(images: Images, threads: int, *, device: str) -> Iterator[Tensor]:
    """DALI as in its own examples: DALI reads, shuffles and draws the crops."""
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
            small = [
                datasets.resized(image[None], datasets.random_window(*image.shape[1:]), images.size)
                for image in decoded
            ]
            yield torch.cat(small).permute(0, 2, 3, 1)


def loader(dataset: type[datasets.Files], device: str, images: Images, threads: int) -> Iterator[Tensor]:
    """A torch DataLoader with worker processes."""
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
    dataset = dataset.shuffle(200).decode("pilrgb").to_tuple("jpg").map_tuple(datasets.Pillow(images).recipe)
    batches = wds.WebLoader(dataset.batched(images.batch_size), batch_size=None, num_workers=threads,
                            multiprocessing_context="fork")  # fmt: skip
    for (batch,) in batches:
        yield batch.to(device, non_blocking=True)


def ffcv(device: str, images: Images, threads: int) -> Iterator[Tensor]:
    """FFCV on its own file format with the JPEGs as they are; the file is written at the first use."""
    from ffcv.fields import RGBImageField  # pyright: ignore[reportMissingImports]
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder  # pyright: ignore[reportMissingImports]
    from ffcv.loader import Loader, OrderOption  # pyright: ignore[reportMissingImports]
    from ffcv.transforms import ToTensor  # pyright: ignore[reportMissingImports]
    from ffcv.writer import DatasetWriter  # pyright: ignore[reportMissingImports]

    path = str(images.folder / "images.beton")
    if not os.path.exists(path):
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90)}
        DatasetWriter(path, fields).from_indexed_dataset(datasets.PillowTuples(images))
    size = (images.size, images.size)
    decoder = RandomResizedCropRGBImageDecoder(size, scale=SCALE, ratio=RATIO)
    batches = Loader(path, batch_size=images.batch_size, num_workers=threads, order=OrderOption.RANDOM, os_cache=True,
                     drop_last=True, pipelines={"image": [decoder, ToTensor()]})  # fmt: skip
    while True:
        for (batch,) in batches:
            yield batch.to(device, non_blocking=True)
