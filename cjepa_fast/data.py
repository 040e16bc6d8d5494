"""Images from a folder to uint8 batches: header scan, order, crop windows, and decoding by NVIDIA DALI.

Nothing here keeps random state. The order of an epoch, the crop window and the flip of an image are pure
functions of (seed, epoch, image id) drawn from Philox, so a run resumes from its step alone and sees the same
pixels whatever the number of ranks, threads or prefetched batches. DALI reads, decodes, resizes: it draws
nothing.

Legend: n images in the source, b images of one rank (the global batch over world_size), H = W = image_size.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from cjepa_fast.errors import UserError
from cjepa_fast.philox import philox4x32

if TYPE_CHECKING:
    import torch

# What DALI decodes on the CPU and (JPEG) on the GPU, and Pillow identifies: the file endings taken for
# images, and Pillow's names of the formats a file may turn out to hold. DALI has no GIF decoder.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")

# The last counter word keeps the streams of one seed apart; the mask sampler's stay below 2**30 there.
_ORDER, _CROP, _FLIP = (int.from_bytes(tag, "little") for tag in (b"ordr", b"crop", b"flip"))

_CROP_ATTEMPTS = 10  # torchvision.transforms.RandomResizedCrop
_SCAN_CHUNK = 512  # files per task: below it the executor's bookkeeping costs more than the headers


# --- what a folder holds


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSource:
    """The images of a folder. `sizes` and `labels` are indexed by image id, the position in `paths`."""

    root: Path
    paths: list[str]  # relative to root, "/"-separated, in code point order: the same on every machine
    sizes: np.ndarray  # int32 [n, 2], height and width after the EXIF orientation
    labels: np.ndarray | None  # int64 [n], an index into `classes`
    classes: tuple[str, ...]
    description: str  # one line: what was found and what was ignored

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, image_id: int) -> str:
        return os.path.join(self.root, self.paths[image_id])


def scan(root: str | Path, *, threads: int | None = None) -> ImageSource:
    """List the images under `root` and read every header (not the pixels) for its size.

    When every image lies in a folder directly under `root`, and there are at least two such folders, their
    names are the classes. Any other tree is a pile of bare images without labels. Hidden files and folders
    are ignored, symbolic links followed.

    Raises:
        UserError: `root` is missing, not a folder, unreadable or without images; or a file named like an
            image is empty, not an image DALI decodes, or over 178,956,970 pixels (a decompression bomb).
    """
    root = Path(root)
    try:
        paths, ignored = _walk(root)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such folder; give the folder that holds the images") from None
    except NotADirectoryError:
        raise UserError(f"{root}: is a file; give the folder that holds the images") from None
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); grant read access") from None
    if not paths:
        others = _count(ignored, "other file")
        raise UserError(f"{root}: holds no images but {others}; give a folder with {' '.join(SUFFIXES)} files")
    sizes = _sizes(root, paths, threads or min(16, os.cpu_count() or 1))

    parents = [path.rpartition("/")[0] for path in paths]
    classes = tuple(sorted(set(parents)))
    labelled = len(classes) > 1 and all(name and "/" not in name for name in classes)
    index = {name: i for i, name in enumerate(classes)}
    found = f"{len(classes):,} class folders" if labelled else f"{_count(len(classes), 'folder')}, no labels"
    ignoring = f"; {_count(ignored, 'other file')} ignored" if ignored else ""
    return ImageSource(
        root=root,
        paths=paths,
        sizes=sizes,
        labels=np.array([index[name] for name in parents], dtype=np.int64) if labelled else None,
        classes=classes if labelled else (),
        description=f"{_count(len(paths), 'image')} in {found}{ignoring}",
    )


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _walk(root: Path) -> tuple[list[str], int]:
    """Relative paths of the image-named files under `root`, sorted, and the number of other files."""
    paths: list[str] = []
    ignored = 0
    folders = [""]
    seen: set[tuple[int, int]] = set()  # else a link to a parent folder would repeat its images without end
    while folders:
        folder = folders.pop()
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(root / folder) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".")
                if entry.is_dir():
                    if not hidden:
                        folders.append(f"{folder}{entry.name}/")
                elif entry.name.lower().endswith(SUFFIXES) and not hidden:
                    paths.append(folder + entry.name)
                else:
                    ignored += 1
    return sorted(paths), ignored


def _sizes(root: Path, paths: list[str], threads: int) -> np.ndarray:
    from PIL import Image

    def read(chunk: list[str]) -> list[tuple[int, int] | str]:
        return [_header(os.path.join(root, path)) for path in chunk]

    Image.init()  # registers the plugins once, before threads would race for it
    chunks = [paths[i : i + _SCAN_CHUNK] for i in range(0, len(paths), _SCAN_CHUNK)]
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # Images of 89 to 179 megapixels are welcome; beyond that Pillow raises instead of warning.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        headers = [header for chunk in pool.map(read, chunks) for header in chunk]
    bad = [(path, header) for path, header in zip(paths, headers, strict=True) if isinstance(header, str)]
    if bad:
        path, reason = bad[0]
        raise UserError(
            f"{os.path.join(root, path)}: {reason}; {len(bad):,} of {len(paths):,} image files are bad, "
            "remove or replace them"
        )
    return np.array(headers, dtype=np.int32)


def _header(path: str) -> tuple[int, int] | str:
    """(height, width) as DALI will see it, or why the file cannot be used."""
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            # Image.getexif would decode a whole PNG to find a late chunk. A TIFF's size is already oriented.
            exif = image.info.get("exif")
    except Image.DecompressionBombError:
        return "larger than 178,956,970 pixels, a decompression bomb"
    except Exception as error:  # a damaged header raises almost anything out of Pillow's parsers
        if isinstance(error, OSError) and error.errno is not None:
            return f"cannot be read ({error.strerror})"
        empty = os.path.getsize(path) == 0
        return "empty (0 bytes)" if empty else "its header is not of a JPEG, PNG, WebP, BMP, PNM or TIFF"
    return (width, height) if exif and _orientation(exif) in (5, 6, 7, 8) else (height, width)


def _orientation(exif: bytes) -> int:
    from PIL import ExifTags, Image

    tags = Image.Exif()
    try:
        tags.load(exif)
        return tags.get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata does not spoil the picture; decoders ignore it too
        return 1


# --- what to show when: pure functions of (seed, epoch, id)


def _draw(index: np.ndarray, attempt: int, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Four uint32 words per index, [len(index), 4]."""
    counter = np.empty((len(index), 4), dtype=np.uint32)
    counter[:, 0] = index
    counter[:, 1:] = attempt, epoch, stream
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


def batch_ids(n: int, *, seed: int, step: int, batch_size: int) -> tuple[int, np.ndarray]:
    """The epoch of global step `step` and the image ids of its global batch, int64 [batch_size].

    An epoch has n // batch_size steps. The n % batch_size images left over are other ones each epoch.

    Raises:
        UserError: a batch is larger than the data set.
    """
    if batch_size > n:
        raise UserError(f"batch_size={batch_size} is larger than the {n} images found; lower it to at most {n}")
    epoch, at = divmod(step, n // batch_size)
    return epoch, epoch_order(n, seed=seed, epoch=epoch)[at * batch_size : (at + 1) * batch_size]


def crop_windows(
    ids: np.ndarray,
    sizes: np.ndarray,
    *,
    seed: int,
    epoch: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Random resized crops: int32 windows [b, 4] of (top, left, height, width) in pixels, inside the image.

    As `torchvision.transforms.RandomResizedCrop` defines them (Szegedy et al., 2015): an area uniform in
    `scale` times the image's, an aspect ratio width / height log-uniform in `ratio`, a uniform position;
    after ten windows that do not fit, the largest central one within `ratio`.

    Args:
        ids: int64 [b]; the only thing, with seed and epoch, that the draws depend on.
        sizes: int32 [b, 2], height and width of these images.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    low, high = ratio
    h = np.where(width < height * low, np.rint(width / low), height)
    w = np.where(width > height * high, np.rint(height * high), width)
    windows = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
    open_ = np.arange(len(ids))
    for attempt in range(_CROP_ATTEMPTS):
        u = _uniform(_draw(ids[open_], attempt, seed=seed, epoch=epoch, stream=_CROP))
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


def flip_flags(ids: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Whether each image is mirrored left to right, bool [len(ids)], with probability 1/2."""
    return _draw(ids, 0, seed=seed, epoch=epoch, stream=_FLIP)[:, 0] >= 2**31


# --- decoding


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The images of one rank in one training step."""

    step: int
    epoch: int
    ids: torch.Tensor  # int64 [b] on the CPU, image ids in the whole data set
    images: torch.Tensor  # uint8 [b, H, W, 3] on the requested device, RGB
    wait_ms: float  # how long the caller was blocked for it


class Batches:
    """Training batches of one rank for steps first_step <= step < last_step (None: without end).

    Rank r gets images [r * b, (r + 1) * b) of the global batch: concatenated over the ranks, the batch is the
    same for any world size. The images stay valid as long as they are referenced: DALI's dynamic executor
    hands over a reference-counted buffer through DLPack, so nothing is copied and nothing overwritten later.

    Args:
        batch_size: global; a multiple of `world_size` and at most len(source).
        device: "cpu", or "cuda:i" to decode (JPEG) and resize there.
        threads: CPU threads that read and decode.
        prefetch: batches in flight; with 1 nothing is decoded while the caller computes.
        hw_decoder_load: share of the JPEGs given to the GPU's hardware decoder, where it has one.

    Raises:
        UserError: on construction for a batch size that does not fit; from `next` for an image that cannot be
            decoded (its header was fine, so it is truncated or changed since the scan), naming the file.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        image_size: int,
        seed: int,
        first_step: int = 0,
        last_step: int | None = None,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        hflip: bool = False,
        device: str = "cpu",
        threads: int = 1,
        prefetch: int = 2,
        hw_decoder_load: float = 0.65,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        if batch_size % world_size:
            raise UserError(f"batch_size={batch_size} is not a multiple of {world_size} ranks; make it one")
        # A batch larger than the data set fails now, not at the first step.
        batch_ids(len(source), seed=seed, step=first_step, batch_size=batch_size)
        fn, types = _dali()
        decoder = _decoder_options(device, hw_decoder_load)

        def graph(files: Any, anchor: Any, shape: Any, flip: Any = None) -> Any:
            images = fn.decoders.image_slice(files, anchor, shape, axis_names="HW", **decoder)
            # The triangular filter is bilinear with antialias: Pillow's and so torchvision's BILINEAR.
            images = fn.resize(images, size=[image_size, image_size], interp_type=types.INTERP_TRIANGULAR)
            return images if flip is None else fn.flip(images, horizontal=flip)

        per_rank = batch_size // world_size

        def plan() -> Iterator[_Request]:
            step = first_step
            while last_step is None or step < last_step:
                epoch, ids = batch_ids(len(source), seed=seed, step=step, batch_size=batch_size)
                ids = ids[rank * per_rank : (rank + 1) * per_rank]
                windows = crop_windows(
                    ids, source.sizes[ids], seed=seed, epoch=epoch, scale=crop_scale, ratio=crop_ratio
                )
                inputs = [windows[:, :2], windows[:, 2:]]
                if hflip:
                    inputs.append(flip_flags(ids, seed=seed, epoch=epoch).astype(np.int32))
                yield _Request(ids=ids, inputs=inputs, step=step, epoch=epoch)
                step += 1

        self._decoded = _decode(
            source,
            plan(),
            graph,
            inputs=3 if hflip else 2,
            batch_size=per_rank,
            device=device,
            threads=threads,
            prefetch=prefetch,
        )

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        import torch

        start = time.perf_counter()
        request, images = next(self._decoded)
        return Batch(
            step=request.step,
            epoch=request.epoch,
            ids=torch.from_numpy(request.ids.copy()),
            images=images,
            wait_ms=(time.perf_counter() - start) * 1e3,
        )

    def close(self) -> None:
        """Stop decoding and free DALI's buffers; batches already handed out stay valid."""
        self._decoded.close()


def center_batches(
    source: ImageSource,
    ids: np.ndarray,
    *,
    image_size: int,
    batch_size: int,
    device: str = "cpu",
    threads: int = 1,
) -> Iterator[torch.Tensor]:
    """The evaluation view of images `ids`, in that order: uint8 [b, H, W, 3] batches, the last may be short.

    Resizes the shorter side to image_size * 256 / 224, or to image_size when the image is no larger than that
    (a CIFAR image at 32 pixels is left as it is), and cuts the central square. Sizes round as in torchvision.
    """
    fn, types = _dali()
    decoder = _decoder_options(device, 0.65)

    def graph(files: Any, size: Any, corner: Any) -> Any:
        images = fn.resize(fn.decoders.image(files, **decoder), size=size, interp_type=types.INTERP_TRIANGULAR)
        return fn.slice(images, corner, [image_size, image_size], axis_names="HW")

    def plan() -> Iterator[_Request]:
        for start in range(0, len(ids), batch_size):
            chunk = np.asarray(ids[start : start + batch_size], dtype=np.int64)
            size = source.sizes[chunk].astype(np.int64)
            short = size.min(axis=1, keepdims=True)
            size = size * np.where(short <= image_size, image_size, image_size * 256 // 224) // short
            corner = np.rint((size - image_size) / 2).astype(np.int32)
            yield _Request(ids=chunk, inputs=[size.astype(np.float32), corner])

    decoded = _decode(
        source, plan(), graph, inputs=2, batch_size=batch_size, device=device, threads=threads, prefetch=2
    )
    return (images for _, images in decoded)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Request:
    """One batch to decode: the images, and the graph's inputs for them besides the file names."""

    ids: np.ndarray
    inputs: list[np.ndarray]
    step: int = 0
    epoch: int = 0


def _dali() -> tuple[Any, Any]:
    """The modules `nvidia.dali.fn` and `nvidia.dali.types`."""
    try:
        from nvidia.dali import fn, types
    except ImportError as error:
        raise UserError(f"NVIDIA DALI cannot be imported ({error}); pip install 'nvidia-dali-cuda130>=2.2'") from None
    return fn, types


def _decoder_options(device: str, hw_decoder_load: float) -> dict[str, Any]:
    # "mixed" decodes JPEGs on the GPU and hands formats the GPU does not know to the CPU decoder.
    return {"device": "cpu"} if device == "cpu" else {"device": "mixed", "hw_decoder_load": hw_decoder_load}


def _decode(
    source: ImageSource,
    plan: Iterator[_Request],
    graph: Callable[..., Any],
    *,
    inputs: int,
    batch_size: int,
    device: str,
    threads: int,
    prefetch: int,
) -> Generator[tuple[_Request, torch.Tensor], None, None]:
    """Run `graph(files, *inputs)` over the requests; closing the generator frees the pipeline."""
    import torch
    from nvidia.dali.pipeline import Pipeline

    fn, _ = _dali()
    gpu = None if device == "cpu" else torch.device(device)
    in_flight: deque[_Request] = deque()

    def feed() -> list[Any]:
        request = next(plan)  # its StopIteration tells DALI that the data ends here
        in_flight.append(request)
        return [[_file_name(source.path(i)) for i in request.ids], *map(np.ascontiguousarray, request.inputs)]

    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=None if gpu is None else gpu.index or 0,
        prefetch_queue_depth=prefetch,
    )
    with pipeline:
        names, *rest = fn.external_source(source=feed, num_outputs=1 + inputs)
        # Mapping a small file costs more than reading it, and a mapped file that someone cuts short kills us.
        pipeline.set_outputs(graph(fn.io.file.read(names, dont_use_mmap=True), *rest))
    while True:
        try:
            (images,) = pipeline.run(None if gpu is None else torch.cuda.current_stream(gpu))
        except StopIteration:
            return
        except RuntimeError as error:
            _blame(source, [i for request in in_flight for i in request.ids], error)
        yield in_flight.popleft(), torch.from_dlpack(images.as_tensor())


def _blame(source: ImageSource, ids: Sequence[int], error: RuntimeError) -> NoReturn:
    """Raise a UserError for the first image that cannot be decoded; DALI does not reliably name it."""
    for image_id in ids:
        path = source.path(image_id)
        if fault := _fault(path, tuple(source.sizes[image_id].tolist())):
            raise UserError(f"{path}: {fault}; remove or replace it and start again") from error
    raise error


def _fault(path: str, scanned: tuple[int, int]) -> str | None:
    """Why an image cannot be decoded in full, None if it can. `scanned` is its (height, width) then."""
    from PIL import Image

    header = _header(path)
    if isinstance(header, str):
        return header
    if header != scanned:
        return "was {} x {} pixels (height x width) at the scan and is {} x {} now".format(*scanned, *header)
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as damage:  # a damaged body, like a damaged header, raises almost anything
        return f"cannot be decoded ({damage})"

    from nvidia.dali.pipeline import Pipeline

    fn, _ = _dali()
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.io.file.read(_file_name(path), dont_use_mmap=True)))
    try:
        pipeline.run()
    except RuntimeError:
        return "a variant of its format that Pillow decodes and DALI does not"
    return None


def _file_name(path: str) -> np.ndarray:
    """A path as `fn.io.file.read` takes it: uint8 [bytes]."""
    return np.frombuffer(os.fsencode(path), dtype=np.uint8)
