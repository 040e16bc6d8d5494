"""Indexed images to uint8 batches: reading ahead, decoding and augmenting by NVIDIA DALI, and bad images.

What is shown when is drawn in `feed.views` and fed to DALI as tensors: DALI draws nothing, so a run resumes from
its step alone and sees the same pixels whatever the number of ranks, threads or prefetched batches.

Legend: b images of one rank (the global batch over world_size), V views, H = W = image_size.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cjepa_fast.errors import UserError
from cjepa_fast.feed.manifest import Mixture, SampleError
from cjepa_fast.feed.views import MAX_VIEWS, Photometric, batch_ids, crop_windows, flip_flags

if TYPE_CHECKING:
    import torch

_PAUSES = (1.0, 5.0, 30.0)  # seconds before trying again to read from storage that seems gone
_DRAWN_AT_ONCE = 2048  # images: for 256 the draws cost 3 us each, most of it NumPy's calls, for 2,048 less than one
_ALARM, _PATIENCE = 60.0, 10  # seconds without an image until that is said, and how often until it is an error

log = logging.getLogger(__name__)

_Part = Future[tuple[list[Any], dict[int, str]]]  # encoded images of a part of a batch; why some are not


# --- batches


class BadImages:
    """The images found to be bad after indexing, by id, and what to do about another one.

    Args:
        policy: "error" raises; "skip" leaves it out from then on, up to 0.1 % of the images (at least one).
        ids: known to be bad.
    """

    def __init__(self, source: Mixture, policy: Literal["error", "skip"] = "error", ids: Collection[int] = ()) -> None:
        self._source, self._policy, self.ids = source, policy, frozenset(ids)

    def add(self, ids: Collection[int]) -> None:
        """Images that were found elsewhere.

        Raises:
            UserError: they are too many now.
        """
        self.ids |= frozenset(ids)
        n = len(self._source)
        if len(self.ids) > max(1, n // 1000):
            name = self._source.name(max(ids))
            raise UserError(f"{len(self.ids)} of {n:,} images turned bad, over the limit of 0.1 %, such as {name}")

    def settle(self, faults: dict[int, str]) -> None:
        """What is wrong with images, by id.

        Raises:
            UserError: the policy is "error", or they are too many.
        """
        if self._policy == "error":
            raise UserError(f"{next(iter(faults.values()))} (or let data.on_error skip show another in its place)")
        for fault in faults.values():
            log.warning("skipped from now on: %s", fault)
        self.add(faults)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The images of one rank in one training step."""

    step: int
    epoch: int
    ids: torch.Tensor  # int64 [b] on the CPU, image ids in the whole data set
    images: torch.Tensor  # uint8 [b, H, W, 3], or [V, b, H, W, 3] of several views, on the requested device, RGB
    wait_ms: float  # how long the caller was blocked for it


class Batches:
    """Training batches of one rank for steps first_step <= step < last_step (None: without end).

    Rank r gets images [r * b, (r + 1) * b) of the global batch: concatenated over the ranks, the batch is the
    same for any world size. The images stay valid as long as they are referenced: DALI's dynamic executor
    hands over a reference-counted buffer through DLPack, so nothing is copied and nothing overwritten later. On a GPU
    DALI works on streams of its own, one batch ahead: the caller's current stream waits for their event, the host does
    not, and the memory is given back in the order of that stream.

    Several views lie image by image in memory, so images[v] is a strided [b, H, W, 3]. Their photometric draws are
    independent; window and flip are shared, so that patches of the views correspond and an image is decoded once.

    Args:
        batch_size: global; a multiple of `world_size` and at most source.visits.
        device: "cpu", or "cuda:i" to decode (JPEG) and resize there.
        threads: CPU threads that decode; as many read.
        photometric: changes of colour and sharpness; none by default.
        views: V, of every image.
        independent_crops: every view gets a window and a flip of its own, view 0 those of a single view, as
            evaluation by augmentation wants it (LiDAR, Thilak et al., 2023). Whole images are decoded then.
        prefetch: batches in flight; with 1 nothing is decoded while the caller computes.
        hw_decoder_load: share of the JPEGs given to the GPU's hardware decoder, where it has one.
        bad: what is known of bad images, and what to do about another one: by default an error. To skip it starts the
            pipeline anew at the same step, see `batch_ids` for what is shown in its place.

    Raises:
        UserError: on construction for a batch size that does not fit; from `next` for a bad image, naming it, or for
            too many of them, or if nothing can be read at all any more.
    """

    def __init__(
        self,
        source: Mixture,
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
        photometric: Photometric | None = None,
        views: int = 1,
        independent_crops: bool = False,
        device: str = "cpu",
        threads: int = 1,
        prefetch: int = 2,
        hw_decoder_load: float = 0.65,
        bad: BadImages | None = None,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        if batch_size % world_size:
            raise UserError(f"batch_size={batch_size} is not a multiple of {world_size} ranks; make it one")
        assert 1 <= views <= MAX_VIEWS, views
        # A batch larger than the data set fails now, not at the first step.
        batch_ids(source, seed=seed, step=first_step, batch_size=batch_size)
        _dali()  # missing, it is told now
        known = bad or BadImages(source)
        cropped = views if independent_crops else 1  # views with a window of their own

        def resize(images: Any) -> Any:
            return _resized(images, image_size, device, threads)

        # DALI's graph holds what its Python functions refer to: not this object, or neither would ever go
        def graph(files: Any, given: dict[str, Any]) -> Any:
            crops = _cropped(files, given, cropped, resize, device, hw_decoder_load)
            if views == 1:
                return _changed(crops[0], given, 0, device)
            return _dali()[0].stack(*(_changed(crops[v % cropped], given, v, device) for v in range(views)))

        def draw(ids: np.ndarray, sizes: np.ndarray, **place: Any) -> dict[str, np.ndarray]:
            drawn: dict[str, np.ndarray] = {}
            for v in range(views):
                if v < cropped:
                    windows = crop_windows(ids, sizes, scale=crop_scale, ratio=crop_ratio, view=v, **place)
                    drawn[f"anchor {v}"], drawn[f"shape {v}"] = windows[:, :2], windows[:, 2:]
                    if hflip:
                        drawn[f"flip {v}"] = flip_flags(ids, view=v, **place).astype(np.int32)
                changes = photometric.draw(ids, view=v, **place) if photometric else {}
                drawn |= {f"{name} {v}": value for name, value in changes.items()}
            return {name: np.ascontiguousarray(value) for name, value in drawn.items()}

        per_rank = batch_size // world_size
        mine = slice(rank * per_rank, (rank + 1) * per_rank)

        def plan(step: int) -> Iterator[_Request]:
            while last_step is None or step < last_step:
                stop = step + max(1, _DRAWN_AT_ONCE // per_rank)
                steps = range(step, stop if last_step is None else min(stop, last_step))
                placed = [batch_ids(source, seed=seed, step=s, batch_size=batch_size, skipped=known.ids) for s in steps]
                for epoch, group in itertools.groupby(placed, lambda batch: batch[0]):
                    parts = [(ids[mine], repeats[mine]) for _, ids, repeats in group]
                    ids, repeats = map(np.concatenate, zip(*parts, strict=True))
                    drawn = draw(ids, source.sizes[ids], seed=seed, epoch=epoch, repeats=repeats)
                    for start in range(0, len(ids), per_rank):
                        part = slice(start, start + per_rank)
                        inputs = {name: value[part] for name, value in drawn.items()}
                        yield _Request(ids=ids[part], inputs=inputs, step=step, epoch=epoch)
                        step += 1

        none = np.arange(0)
        options = _Options(
            graph=graph, inputs=tuple(draw(none, source.sizes[none], seed=seed, epoch=0, repeats=none)),
            batch_size=per_rank, device=device, threads=threads, prefetch=prefetch,
        )  # fmt: skip
        self._views = views
        self._decoded = _decode(source, plan, options, first=first_step, bad=known)

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
            images=images if self._views == 1 else images.transpose(0, 1),
            wait_ms=(time.perf_counter() - start) * 1e3,
        )

    def close(self) -> None:
        """Stop reading and decoding, and free DALI's buffers; batches already handed out stay valid."""
        self._decoded.close()


def center_batches(
    source: Mixture,
    ids: np.ndarray,
    *,
    image_size: int,
    batch_size: int,
    device: str = "cpu",
    threads: int = 1,
    bad: BadImages | None = None,
) -> Iterator[torch.Tensor]:
    """The evaluation view of images `ids`, in that order: uint8 [b, H, W, 3] batches, the last may be short.

    Resizes the shorter side to image_size * 256 / 224, or to image_size when the image is no larger than that
    (a CIFAR image at 32 pixels is left as it is), and cuts the central square. Sizes round as in torchvision.
    In the place of a bad image that is skipped stands the next one with its label.

    Raises:
        UserError: as `Batches`.
    """
    known = bad or BadImages(source)
    fn, types = _dali()

    def graph(files: Any, given: dict[str, Any]) -> Any:
        images = fn.decoders.image(files, **_decoder_options(device))
        images = fn.resize(images, size=given["size"], interp_type=types.INTERP_TRIANGULAR)
        return fn.slice(images, given["corner"], [image_size, image_size], axis_names="HW")

    def plan(step: int) -> Iterator[_Request]:
        for start in range(step * batch_size, len(ids), batch_size):
            chunk = np.array([_with_its_label(source, i, known.ids) for i in ids[start : start + batch_size].tolist()])
            size = source.sizes[chunk].astype(np.int64)
            short = size.min(axis=1, keepdims=True)
            size = size * np.where(short <= image_size, image_size, image_size * 256 // 224) // short
            corner = np.rint((size - image_size) / 2).astype(np.int32)
            inputs = {"size": size.astype(np.float32), "corner": corner}
            yield _Request(ids=chunk, inputs=inputs, step=start // batch_size)

    options = _Options(
        graph=graph, inputs=("size", "corner"), batch_size=batch_size, device=device, threads=threads, prefetch=2
    )
    return (images for _, images in _decode(source, plan, options, first=0, bad=known))


def _with_its_label(source: Mixture, i: int, bad: Collection[int]) -> int:
    """Image i, or the first behind it (around the end) that is not bad and has its label."""
    while i in bad:
        alike = np.arange(len(source)) if source.labels is None else np.flatnonzero(source.labels == source.labels[i])
        after = np.roll(alike, -int(np.searchsorted(alike, i, side="right")))
        good = after[~np.isin(after, list(bad))]
        if not len(good):
            raise UserError(f"{source.name(i)}: is bad, and no image with its label is left")
        i = int(good[0])
    return i


# --- decoding


@dataclass(kw_only=True, eq=False)
class _Request:
    """One batch to decode: the images, and the graph's inputs for them besides the encoded bytes, by name."""

    ids: np.ndarray
    inputs: dict[str, np.ndarray]
    step: int
    epoch: int = 0
    encoded: list[Any] = field(default_factory=list)  # DALI's TensorCPU, uint8 [bytes] each
    unread: dict[int, str] = field(default_factory=dict)  # ids whose bytes cannot be had, and why


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How a pipeline is built; `graph(files, inputs by name)` makes the images of encoded bytes."""

    graph: Callable[[Any, dict[str, Any]], Any]
    inputs: tuple[str, ...]
    batch_size: int
    device: str
    threads: int
    prefetch: int


class _Failed(Exception):
    """A batch could not be decoded; `requests` are it and those behind it in the pipeline."""

    def __init__(self, requests: list[_Request], error: Exception | None) -> None:
        super().__init__()
        self.requests, self.error = requests, error


def _dali() -> tuple[Any, Any]:
    """The modules `nvidia.dali.fn` and `nvidia.dali.types`."""
    try:
        from nvidia.dali import fn, types
    except ImportError as error:
        raise UserError(f"NVIDIA DALI cannot be imported ({error}); pip install 'nvidia-dali-cuda130>=2.2'") from None
    return fn, types


def _decoder_options(device: str, hw_decoder_load: float = 0.65) -> dict[str, Any]:
    if device == "cpu":
        return {"device": "cpu"}
    # "mixed" decodes JPEGs on the GPU and hands formats the GPU does not know to the CPU decoder. Fancy upsampling is
    # the CPU's way with chroma of half the resolution; DALI's default for the GPU is another.
    return {"device": "mixed", "hw_decoder_load": hw_decoder_load, "jpeg_fancy_upsampling": True}


def _resized(images: Any, size: int, device: str, threads: int) -> Any:
    """uint8 HWC images of DALI's graph as squares: bilinear with antialias, as Pillow and torchvision do it.

    On a GPU it is DALI's triangular filter. On a CPU that filter takes about as long as decoding (13 us for a CIFAR
    image, 2.0 of 3.4 ms for an ImageNet crop), so there our own runs within DALI's graph, in `threads` threads.
    """
    fn, types = _dali()
    if device != "cpu":
        return fn.resize(images, size=[size, size], interp_type=types.INTERP_TRIANGULAR)

    def resize(images: list[np.ndarray]) -> list[np.ndarray]:
        from cjepa_fast.ops import resize_images

        return list(resize_images(images, size, threads))

    return fn.python_function(images, function=resize, batch_processing=True, output_layouts="HWC")


def _cropped(
    files: Any, given: dict[str, Any], crops: int, resize: Callable[[Any], Any], device: str, hw_decoder_load: float
) -> list[Any]:
    """Windows "anchor v", "shape v" of encoded images, resized to squares and flipped by "flip v": uint8 HWC."""
    fn, _ = _dali()
    decoder = _decoder_options(device, hw_decoder_load)
    # A GPU decodes no windows: with the nvImageCodec 0.9 that DALI 2.4 asks for, those of JPEGs end the process on an
    # H100 (NVIDIA/nvImageCodec issue 55), and where nvJPEG is older than 13.2, fancy upsampling takes them to the CPU.
    whole = fn.decoders.image(files, **decoder) if crops > 1 or device != "cpu" else None
    found = []
    for v in range(crops):
        window = (given[f"anchor {v}"], given[f"shape {v}"])
        if whole is None:
            images = fn.decoders.image_slice(files, *window, axis_names="HW", **decoder)  # decodes the window alone
        else:
            images = fn.slice(whole, *window, axis_names="HW")
        images, flip = resize(images), given.get(f"flip {v}")
        found.append(images if flip is None else fn.flip(images, horizontal=flip))
    return found


def _changed(images: Any, given: dict[str, Any], view: int, device: str) -> Any:
    """Images after `Photometric.draw` for a view: uint8 HWC, rounded once after colour, blur and solarise each."""
    from nvidia.dali import math

    fn, types = _dali()

    def operand(name: str) -> Any:  # where the images are, unlike arguments, which stay on the CPU
        node = given[f"{name} {view}"]
        return node if device == "cpu" else node.gpu()

    if f"color {view}" in given:
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        colored = fn.coord_transform(images, M=given[f"color {view}"]) + operand("lift") * fn.reductions.mean(grey)
        images = fn.cast(colored, dtype=types.UINT8)  # rounds and saturates
    if f"sigma {view}" in given:
        images = fn.gaussian_blur(images, sigma=given[f"sigma {view}"], window_size=given[f"window {view}"])
    if f"unsolarized {view}" in given:
        inverted = images ^ types.Constant(np.uint8(255))
        images = math.min(images, inverted | operand("unsolarized"))  # of x and 255 - x the darker one
    return images


def _decode(
    source: Mixture,
    plan: Callable[[int], Iterator[_Request]],
    options: _Options,
    *,
    first: int,
    bad: BadImages,
) -> Generator[tuple[_Request, torch.Tensor], None, None]:
    """Decode the requests of plan(first); closing the generator ends its threads and frees the pipeline.

    A pipeline is lost after an error: unless the bad images found are settled by one, another pipeline starts where it
    failed.
    """
    failures = 0
    while True:
        stream = _stream(source, plan(first), options)
        try:
            for request, images in stream:
                yield request, images
                first, failures = request.step + 1, 0
            return
        except _Failed as failed:
            failures += 1
            _diagnose(source, failed, options, failures, bad)
        finally:
            stream.close()


def _stream(
    source: Mixture, requests: Iterator[_Request], options: _Options
) -> Generator[tuple[_Request, torch.Tensor], None, None]:
    """Decode requests in one pipeline. Raises _Failed."""
    import torch
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.tensors import TensorListCPU

    fn, _ = _dali()
    gpu = None if options.device == "cpu" else torch.device(options.device)
    in_flight: deque[_Request] = deque()
    used: deque[tuple[_Request, Any]] = deque()  # with CUDA events
    pipeline: Any = None
    feed = _Feed(source, requests, threads=options.threads, depth=options.prefetch)

    unreadable: list[_Request] = []

    def supply() -> list[Any]:
        request = feed.get()
        # DALI 2.4 may crash over bytes that start like no image: it throws while its threads still use what that frees
        if request is not None and request.unread:
            unreadable.append(request)
            request = None
        if request is None:
            raise StopIteration  # tells DALI that the data ends here
        in_flight.append(request)
        # A list of tensors DALI would look through one by one.
        encoded = TensorListCPU(request.encoded, contiguous=False)  # pyright: ignore[reportCallIssue]
        return [encoded, *(request.inputs[name] for name in options.inputs)]

    try:
        pipeline = Pipeline(
            batch_size=options.batch_size,
            num_threads=options.threads,
            device_id=None if gpu is None else gpu.index or 0,
            prefetch_queue_depth=options.prefetch,
        )
        with pipeline:
            # Copying the encoded images would take milliseconds of the caller's time.
            files, *rest = fn.external_source(source=supply, num_outputs=1 + len(options.inputs), no_copy=True)
            pipeline.set_outputs(options.graph(files, dict(zip(options.inputs, rest, strict=True))))
        while True:
            try:
                (images,) = pipeline.run(None if gpu is None else torch.cuda.current_stream(gpu))
            except StopIteration:
                if unreadable:
                    raise _Failed(unreadable, None) from None
                return
            except RuntimeError as error:
                raise _Failed(list(in_flight), error) from None
            request = in_flight.popleft()
            if gpu is not None:  # the GPU may still be reading the encoded images
                used.append((request, torch.cuda.current_stream(gpu).record_event()))
                while used[0][1].query() and len(used) > 1:
                    used.popleft()
            yield request, torch.from_dlpack(images.as_tensor())
    finally:
        feed.close()
        pipeline = None  # ends DALI's threads


class _Feed:
    """Plans batches and reads their images ahead, in threads that are left behind in a read that never ends."""

    def __init__(self, source: Mixture, requests: Iterator[_Request], *, threads: int, depth: int) -> None:
        self._source, self._requests, self._stopped = source, requests, False
        self._ready: queue.Queue[tuple[_Request, list[_Part]] | Exception | None] = queue.Queue(depth)
        self._tasks: queue.SimpleQueue[tuple[_Part, np.ndarray] | None] = queue.SimpleQueue()
        self._parts = 2 * threads  # of a batch; more than threads, as some are slower to read
        self._planner = threading.Thread(target=self._plan, daemon=True, name="plan batches")
        self._readers = [threading.Thread(target=self._read, daemon=True, name="read images") for _ in range(threads)]
        for thread in (self._planner, *self._readers):
            thread.start()

    def get(self) -> _Request | None:
        """The next request with its encoded images, None behind the last.

        Raises:
            UserError: nothing came for ten minutes.
        """
        item = self._wait(self._ready.get)
        if isinstance(item, Exception):
            raise item
        if item is None:
            return None
        request, parts = item
        for part, ids in zip(parts, np.array_split(request.ids, len(parts)), strict=True):
            data, unread = self._wait(part.result, ids)
            request.encoded += data
            request.unread |= unread
        return request

    def _wait(self, get: Callable[..., Any], ids: np.ndarray | None = None) -> Any:
        where = ""
        for times in range(1, _PATIENCE + 1):
            try:
                return get(timeout=_ALARM)
            except (queue.Empty, FutureTimeoutError):
                where = "" if ids is None else f", reading {self._source.name(int(ids[0]))} or one soon behind it"
                log.warning("no image for %g s%s: is the storage slow or gone?", times * _ALARM, where)
        raise UserError(f"no image for {_PATIENCE * _ALARM:g} s{where}: go on with --resume when the storage is back")

    def close(self) -> None:
        self._stopped = True
        for _ in self._readers:
            self._tasks.put(None)
        while self._planner.is_alive():  # perhaps waiting for room
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._planner.join(0.001)
        for thread in self._readers:
            thread.join(1.0)

    def _plan(self) -> None:
        try:
            for request in self._requests:
                parts: list[_Part] = []
                for ids in np.array_split(request.ids, min(len(request.ids), self._parts)):
                    parts.append(Future())
                    self._tasks.put((parts[-1], ids))
                self._ready.put((request, parts))
                if self._stopped:
                    return
            self._ready.put(None)
        except Exception as error:  # for whoever waits in `get`
            self._ready.put(error)

    def _read(self) -> None:
        from nvidia.dali.tensors import TensorCPU  # made here: arrays DALI would convert in the caller's time

        while (task := self._tasks.get()) is not None and not self._stopped:
            part, ids = task
            encoded, unread = [], {}
            for data in self._source.read_many(ids):
                if isinstance(data, SampleError):
                    unread[data.sample] = str(data)
                else:
                    encoded.append(TensorCPU(data))
            part.set_result((encoded, unread))


# --- what is wrong


def _diagnose(source: Mixture, failed: _Failed, options: _Options, failures: int, bad: BadImages) -> None:
    """Find the bad images of a batch that failed for the `failures`th time, and settle them.

    Returns if it is worth trying again. What no image explains is tried thrice, storage that is gone is waited for.
    """
    for request in failed.requests:
        faults = _unread(source, request) if request.unread else _faults(source, request, options)
        if request.unread and len(faults) == len(set(request.ids.tolist())) > 1:
            what = f"{next(iter(faults.values()))}. No image of its batch can be read: is the storage gone?"
            if failures > len(_PAUSES):
                raise UserError(f"{what} Go on with --resume when it is back")
            log.warning("%s Trying again in %g s", what, _PAUSES[failures - 1])
            time.sleep(_PAUSES[failures - 1])
            return
        if faults:
            bad.settle(faults)
            return
    if failures > len(_PAUSES):
        raise failed.error or UserError("images could not be read, and can be now; go on with --resume")
    why = failed.error or "some could not be read"
    log.warning("a batch failed although each of its images is sound now; trying again (%s)", why)


def _unread(source: Mixture, request: _Request) -> dict[int, str]:
    """Why images of a request cannot be read, by id, asked anew: storage that went while they were read, and gave some
    of them, or that is back by now, is no fault of theirs.
    """
    again = itertools.chain.from_iterable(source.read_many(request.ids[k : k + 1]) for k in range(len(request.ids)))
    return {error.sample: str(error) for error in again if isinstance(error, SampleError)}


def _faults(source: Mixture, request: _Request, options: _Options) -> dict[int, str]:
    """What is wrong with the images of a request, by id: by a look at their bytes, else by decoding each alone."""
    found = {i: fault for i in request.ids.tolist() if (fault := source.fault(i))}
    if found:
        return found
    alone = replace(options, batch_size=1, prefetch=1, threads=1)
    for k, i in enumerate(request.ids.tolist()):
        one = slice(k, k + 1)
        single = _Request(ids=request.ids[one], inputs={name: x[one] for name, x in request.inputs.items()}, step=0)
        try:
            list(_stream(source, iter([single]), alone))
        except _Failed:
            found[i] = f"{source.name(i)}: DALI cannot decode it"
    return found
