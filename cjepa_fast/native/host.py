"""The door to the compiled library of `csrc/`: found beside the package, else built once per user.

The library has a plain C interface (ctypes), so one build serves every version of Python and torch. It
carries the hash of its sources; one built from other sources is never used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

# setup.py runs this file by path, without NumPy: nothing but the standard library at this level.
if TYPE_CHECKING:
    import numpy as np

    from cjepa_fast.reference.masks import MaskArrays, MaskSpec

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
# No -march=native: the cache may be shared by machines of several kinds.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread")
_BUILD_TIMEOUT_S = 120


class _Spec(ctypes.Structure):
    """`MaskSpec` of csrc/mask_spec.h."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint32),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("mode", "height", "width", "num_targets", "target_h", "target_w", "context_h", "context_w"),
                *("min_keep", "keep", "cap", "union_cap"),
            )
        ),
    )


class _Outputs(ctypes.Structure):
    """`MaskOutputs` of csrc/mask_spec.h, in the order of `MaskArrays`."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("context", "target", "counts", "offsets", "image_of"),
            *("inverse", "union_patches", "union_offsets", "target_slot"),
        )
    )


class _Unavailable(Exception):
    """No library; the message says why."""


def sources() -> list[Path]:
    return sorted((PACKAGE / "csrc").glob("*.cpp"))


def headers() -> list[Path]:
    return sorted((PACKAGE / "csrc").glob("*.h"))


def source_hash() -> str:
    """Sixteen hex digits that change with any source, header or flag."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in [*sources(), *headers()]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _open(path: Path) -> ctypes.CDLL | None:
    """The library at `path` with its functions typed, or None if it cannot be loaded or is stale."""
    try:
        library = ctypes.CDLL(str(path))
        library.cjepa_source_hash.restype = ctypes.c_char_p
        if library.cjepa_source_hash().decode() != source_hash():
            log.info("%s was built from other sources: ignored", path)
            return None
    except (OSError, AttributeError) as error:
        log.info("%s cannot be loaded (%s): ignored", path, error)
        return None
    pointer, length, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.cjepa_philox4x32.argtypes = (pointer, ctypes.c_uint64, pointer)
    library.cjepa_philox4x32.restype = None
    library.cjepa_sample_masks.argtypes = (pointer, pointer, length, threads, pointer)
    library.cjepa_sample_masks.restype = ctypes.c_int
    library.cjepa_resize.argtypes = (pointer, pointer, length, ctypes.c_int32, threads, pointer)
    library.cjepa_resize.restype = None
    return library


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise _Unavailable(f"CXX={chosen} is not a program")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise _Unavailable("no C++ compiler (g++, clang++, c++ or $CXX) was found")


def _build(path: Path) -> None:
    """Compile the sources to `path`; several processes may, as each renames a complete file into place."""
    command = _compiler()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            output = Path(folder, path.name)
            define = f'-DCJEPA_SOURCE_HASH="{source_hash()}"'
            files = [str(source) for source in sources()]
            command = [*command, *FLAGS, "-shared", define, *files, "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
            if done.returncode != 0:
                error = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
                raise _Unavailable(f"{command[0]} failed: {error}")
            os.replace(output, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"the library could not be built in {path.parent}: {error}") from error
    log.info("built the native library with %s: %s", command[0], path)


def _cached_path() -> Path:
    from cjepa_fast.cache import cache_directory

    return cache_directory() / f"native-{source_hash()}-{sys.platform}-{platform.machine()}.so"


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not sources():
        return f"{PACKAGE / 'csrc'} holds no sources"
    for path in sorted(PACKAGE.glob("_native*.so")):
        if (library := _open(path)) is not None:
            return library
    path = _cached_path()
    if path.exists() and (library := _open(path)) is not None:
        return library
    try:
        _build(path)
    except _Unavailable as reason:
        return str(reason)
    return _open(path) or f"{path} was built but cannot be loaded"


def why_unavailable() -> str | None:
    """None if the compiled library is loaded (built first if need be), else the reason in one line."""
    found = _load()
    return found if isinstance(found, str) else None


def _library() -> ctypes.CDLL:
    found = _load()
    assert not isinstance(found, str), found
    return found


def philox4x32(counter: tuple[int, int, int, int], seed: int) -> tuple[int, ...]:
    """The library's Philox4x32-10, for tests: four 32-bit words in, four out."""
    out = (ctypes.c_uint32 * 4)()
    _library().cjepa_philox4x32((ctypes.c_uint32 * 4)(*counter), seed, out)
    return tuple(out)


def sample_masks(
    spec: MaskSpec, ids: np.ndarray, threads: int = 1, *, inverse: bool = False, union: bool = False
) -> MaskArrays:
    """As `reference_masks.sample`, bit for bit, for any number of threads; the arguments have been checked."""
    import numpy as np

    from cjepa_fast.reference.masks import MaskArrays, Mode

    batch, patches = len(ids), spec.height * spec.width
    targets = (batch, spec.num_targets, spec.target_h * spec.target_w)
    packed, faithful = spec.mode == Mode.PACKED, spec.mode == Mode.FAITHFUL
    room = spec.cap if packed else batch * (spec.context_h * spec.context_w if faithful else spec.keep)
    arrays = MaskArrays(
        context=np.empty(room, np.int16),
        target=np.empty(targets, np.int16),
        counts=np.empty(batch, np.int32),
        offsets=np.empty(batch + 1, np.int32) if packed else None,
        image_of=np.empty(room, np.int32) if packed else None,
        inverse=np.empty((batch, patches), np.int16) if inverse else None,
        union=np.empty(spec.union_cap, np.int16) if union else None,
        union_offsets=np.empty(batch + 1, np.int32) if union else None,
        target_slot=np.empty(targets, np.int16) if union else None,
    )
    outputs = _Outputs(*(None if array is None else array.ctypes.data for array in arrays))
    status = _library().cjepa_sample_masks(
        ctypes.byref(_Spec(*spec)), ids.ctypes.data, batch, threads, ctypes.byref(outputs)
    )
    if status != 0:
        raise RuntimeError(f"{('impossible block sizes', 'no context for some image')[status - 1]} at {spec}")
    if packed:
        return arrays
    kept = int(arrays.counts.min()) if faithful else spec.keep
    return arrays._replace(context=arrays.context[: batch * kept].reshape(batch, kept))


def resize(images: Sequence[np.ndarray], size: int, threads: int) -> np.ndarray:
    """See `ops.resize_images`."""
    import numpy as np

    memory = [image.__array_interface__ for image in images]
    assert all(m["strides"] is None for m in memory), "not C-contiguous"
    addresses = np.array([m["data"][0] for m in memory], dtype=np.uint64)
    sizes = np.array([m["shape"][:2] for m in memory], dtype=np.int32)
    out = np.empty((len(images), size, size, 3), dtype=np.uint8)
    _library().cjepa_resize(addresses.ctypes.data, sizes.ctypes.data, len(images), size, threads, out.ctypes.data)
    return out
