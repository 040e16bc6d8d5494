"""The C++ library: masks and resized images on the CPU."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cjepa_fast.native import build
from cjepa_fast.reference.masks import MaskArrays, MaskSpec, Mode

POINTER = ctypes.c_void_p
FUNCTIONS: build.Functions = {
    "cjepa_philox4x32": (None, POINTER, ctypes.c_uint64, POINTER),
    "cjepa_sample_masks": (ctypes.c_int, POINTER, POINTER, ctypes.c_int64, ctypes.c_int, POINTER),
    "cjepa_resize": (None, POINTER, POINTER, ctypes.c_int64, ctypes.c_int32, ctypes.c_int, POINTER),
}


class Spec(ctypes.Structure):
    """`MaskSpec` of csrc/mask_spec.h."""

    _fields_ = tuple(
        (name, {"seed": ctypes.c_uint64, "step": ctypes.c_uint32}.get(name, ctypes.c_int32))
        for name in MaskSpec._fields
    )


class Outputs(ctypes.Structure):
    """`MaskOutputs` of csrc/mask_spec.h: a null pointer is an output that is not wanted."""

    _fields_ = tuple((name, POINTER) for name in MaskArrays._fields)


def compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, else g++, clang++ or c++. Raises `build.Unavailable`."""
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise build.Unavailable(f"CXX={chosen} is not a program")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise build.Unavailable("no C++ compiler (g++, clang++, c++ or $CXX) was found")


LIBRARY = build.Library(lambda: build.load("native", "cpp", build.HOST_FLAGS, compiler, FUNCTIONS))
why_unavailable = LIBRARY.why_unavailable


def philox4x32(counter: tuple[int, int, int, int], seed: int) -> tuple[int, ...]:
    """Return the four words of the library's Philox4x32-10 at a counter of four words, for tests."""
    out = (ctypes.c_uint32 * 4)()
    LIBRARY().cjepa_philox4x32((ctypes.c_uint32 * 4)(*counter), seed, out)
    return tuple(out)


def empty_outputs(spec: MaskSpec, batch: int, inverse: bool, union: bool, empty: Callable[..., Any]) -> list[Any]:
    """Return memory for each field of `MaskArrays`, None for fields that are not wanted.

    `empty(shape, dtype)` makes an array or a tensor; `dtype` is "int16" or "int32". Contexts of faithful mode get room
    for the whole window.
    """
    packed = spec.mode == Mode.PACKED
    window = spec.context_h * spec.context_w if spec.mode == Mode.FAITHFUL else spec.keep
    targets = (batch, spec.num_targets, spec.target_h * spec.target_w)
    return [
        empty(spec.cap if packed else (batch, window), "int16"),
        empty(targets, "int16"),
        empty(batch, "int32"),
        empty(batch + 1, "int32") if packed else None,
        empty(spec.cap, "int32") if packed else None,
        empty((batch, spec.height * spec.width), "int16") if inverse else None,
        empty(spec.union_cap, "int16") if union else None,
        empty(batch + 1, "int32") if union else None,
        empty(targets, "int16") if union else None,
    ]


def sample_masks(
    spec: MaskSpec, ids: np.ndarray, threads: int = 1, *, inverse: bool = False, union: bool = False
) -> MaskArrays:
    """Return the masks of `reference.masks.sample`, bit for bit, for any number of threads.

    `reference.masks.check` must have passed the arguments. Raises RuntimeError if an image finds no context.
    """
    batch = len(ids)
    arrays = MaskArrays(*empty_outputs(spec, batch, inverse, union, np.empty))
    outputs = Outputs(*(None if array is None else array.ctypes.data for array in arrays))
    status = LIBRARY().cjepa_sample_masks(
        ctypes.byref(Spec(*spec)), ids.ctypes.data, batch, threads, ctypes.byref(outputs)
    )
    if status != 0:
        raise RuntimeError(f"{('impossible block sizes', 'no context for some image')[status - 1]} at {spec}")
    if spec.mode != Mode.FAITHFUL:
        return arrays
    kept = int(arrays.counts.min())  # the library has moved the contexts together
    return arrays._replace(context=arrays.context.reshape(-1)[: batch * kept].reshape(batch, kept))


def resize(images: Sequence[np.ndarray], size: int, threads: int) -> np.ndarray:
    """Return images as squares: see `ops.resize_images`."""
    memory = [image.__array_interface__ for image in images]
    assert all(m["strides"] is None for m in memory), "not C-contiguous"
    addresses = np.array([m["data"][0] for m in memory], dtype=np.uint64)
    sizes = np.array([m["shape"][:2] for m in memory], dtype=np.int32)
    out = np.empty((len(images), size, size, 3), dtype=np.uint8)
    LIBRARY().cjepa_resize(addresses.ctypes.data, sizes.ctypes.data, len(images), size, threads, out.ctypes.data)
    return out
