"""Decoding, cropping, resizing and colour changes: NVIDIA DALI's graphs, and the pipeline that runs one.

DALI draws nothing: windows, flips and colours reach it as inputs of the graph (`feed.views`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cjepa_fast.errors import UserError
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.feed.read import Reader, Request
from cjepa_fast.feed.views import Views

if TYPE_CHECKING:
    import torch

HW_DECODER_LOAD = 0.65  # share of the JPEGs for the GPU's hardware decoder, where it has one: NVIDIA's default


class Place(NamedTuple):
    """The part of each batch that a process decodes, and where."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"  # or "cuda:i", which decodes JPEGs and resizes there
    threads: int = 1  # CPU threads that decode; as many read


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of a pipeline; `graph(files, inputs by name)` turns encoded bytes into images."""

    graph: Callable[[Any, dict[str, Any]], Any]
    inputs: tuple[str, ...]
    batch_size: int  # of this process
    place: Place
    prefetch: int  # batches in flight; with 1, DALI decodes nothing while the caller computes


class Failed(Exception):
    """A batch that could not be decoded; `requests` are this one and those behind it in the pipeline."""

    def __init__(self, requests: list[Request], error: Exception | None) -> None:
        super().__init__()
        self.requests, self.error = requests, error


def dali() -> tuple[Any, Any]:
    """Return the modules `nvidia.dali.fn` and `nvidia.dali.types`.

    Raises:
        UserError: DALI cannot be imported.
    """
    try:
        from nvidia.dali import fn, types
    except ImportError as error:
        raise UserError(f"NVIDIA DALI cannot be imported ({error}); pip install 'nvidia-dali-cuda130>=2.2'") from None
    return fn, types


def training_graph(files: Any, given: dict[str, Any], *, views: Views, place: Place) -> Any:
    """Return uint8 HWC images of encoded ones, or VHWC stacks of several views, from the inputs of `draw_views`."""
    crops = _cropped(files, given, views, place)
    images = [_changed(crops[v % len(crops)], given, v, place.device) for v in range(views.count)]
    return images[0] if views.count == 1 else dali()[0].stack(*images)


def center_graph(files: Any, given: dict[str, Any], *, image_size: int, place: Place) -> Any:
    """Return uint8 HWC images resized to "size" and cut to squares at "corner"."""
    fn, types = dali()
    images = fn.decoders.image(files, **_decoder_options(place.device))
    images = fn.resize(images, size=given["size"], interp_type=types.INTERP_TRIANGULAR)
    return fn.slice(images, given["corner"], [image_size, image_size], axis_names="HW")


def _decoder_options(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"device": "cpu"}
    # "mixed" decodes JPEGs on the GPU and other formats on the CPU. Fancy upsampling treats chroma of half the
    # resolution as the CPU does; DALI's default for the GPU differs.
    return {"device": "mixed", "hw_decoder_load": HW_DECODER_LOAD, "jpeg_fancy_upsampling": True}


def _cropped(files: Any, given: dict[str, Any], views: Views, place: Place) -> list[Any]:
    """Cut the windows "anchor v", "shape v" out of encoded images, resize them to squares, flip them by "flip v"."""
    fn, _ = dali()
    options = _decoder_options(place.device)
    # A GPU decodes no windows: with the nvImageCodec 0.9 that DALI 2.4 asks for, those of JPEGs end the process on an
    # H100 (NVIDIA/nvImageCodec issue 55), and with nvJPEG before 13.2, fancy upsampling moves them to the CPU.
    whole = fn.decoders.image(files, **options) if views.windows > 1 or place.device != "cpu" else None
    found = []
    for v in range(views.windows):
        window = (given[f"anchor {v}"], given[f"shape {v}"])
        if whole is None:
            images = fn.decoders.image_slice(files, *window, axis_names="HW", **options)  # decodes the window alone
        else:
            images = fn.slice(whole, *window, axis_names="HW")
        images, flip = _resized(images, views.image_size, place), given.get(f"flip {v}")
        found.append(images if flip is None else fn.flip(images, horizontal=flip))
    return found


def _resized(images: Any, size: int, place: Place) -> Any:
    """Resize uint8 HWC images to squares: bilinear with antialias, as Pillow and torchvision do.

    On a GPU this is DALI's triangular filter. On a CPU that filter takes about as long as decoding (13 us for a CIFAR
    image, 2.0 of 3.4 ms for an ImageNet crop), so `ops.resize_images` runs inside DALI's graph.
    """
    fn, types = dali()
    if place.device != "cpu":
        return fn.resize(images, size=[size, size], interp_type=types.INTERP_TRIANGULAR)

    def resize(images: list[np.ndarray]) -> list[np.ndarray]:
        from cjepa_fast.ops import resize_images

        return list(resize_images(images, size, place.threads))

    return fn.python_function(images, function=resize, batch_processing=True, output_layouts="HWC")


def _changed(images: Any, given: dict[str, Any], view: int, device: str) -> Any:
    """Apply `Photometric.draw` of a view to uint8 HWC images, rounded after colour, after blur and after solarise."""
    from nvidia.dali import math

    fn, types = dali()

    def operand(name: str) -> Any:  # operands must lie with the images; arguments stay on the CPU
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
        images = math.min(images, inverted | operand("unsolarized"))  # the darker of x and 255 - x
    return images


def stream(
    source: Mixture, requests: Iterator[Request], options: Options
) -> Generator[tuple[Request, torch.Tensor], None, None]:
    """Decode requests in one pipeline; closing the generator ends its threads and frees its buffers.

    The images stay valid as long as they are referenced: DALI's dynamic executor hands a reference-counted buffer over
    by DLPack, without a copy. On a GPU, DALI works on streams of its own: the caller's current stream waits for their
    event, the host does not, and memory is given back in the order of that stream.

    Raises:
        Failed: a batch could not be read or decoded; the pipeline is lost.
    """
    import torch
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.tensors import TensorListCPU

    fn, _ = dali()
    gpu = None if options.place.device == "cpu" else torch.device(options.place.device)
    in_flight: deque[Request] = deque()
    used: deque[tuple[Request, Any]] = deque()  # with CUDA events
    pipeline: Any = None
    reader = Reader(source, requests, threads=options.place.threads, depth=options.prefetch)
    unreadable: list[Request] = []

    def supply() -> list[Any]:
        request = reader.get()
        # Bytes that start like no image may crash DALI 2.4: it throws while its threads still use freed memory
        if request is not None and request.unread:
            unreadable.append(request)
            request = None
        if request is None:
            raise StopIteration  # tells DALI that the data ends here
        in_flight.append(request)
        # DALI would look through a list of tensors one by one
        encoded = TensorListCPU(request.encoded, contiguous=False)  # pyright: ignore[reportCallIssue]
        return [encoded, *(request.inputs[name] for name in options.inputs)]

    try:
        pipeline = Pipeline(
            batch_size=options.batch_size,
            num_threads=options.place.threads,
            device_id=None if gpu is None else gpu.index or 0,
            prefetch_queue_depth=options.prefetch,
        )
        with pipeline:
            # Copying the encoded images would take milliseconds of the caller's time
            files, *rest = fn.external_source(source=supply, num_outputs=1 + len(options.inputs), no_copy=True)
            pipeline.set_outputs(options.graph(files, dict(zip(options.inputs, rest, strict=True))))
        while True:
            try:
                (images,) = pipeline.run(None if gpu is None else torch.cuda.current_stream(gpu))
            except StopIteration:
                if unreadable:
                    raise Failed(unreadable, None) from None
                return
            except RuntimeError as error:
                raise Failed(list(in_flight), error) from None
            request = in_flight.popleft()
            if gpu is not None:  # the GPU may still read the encoded images
                used.append((request, torch.cuda.current_stream(gpu).record_event()))
                while used[0][1].query() and len(used) > 1:
                    used.popleft()
            yield request, torch.from_dlpack(images.as_tensor())
    finally:
        reader.close()
        pipeline = None  # ends DALI's threads
