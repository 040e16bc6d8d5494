"""The manifest: place, size, format, checksum and label of every image of a source, in a few flat arrays.

The file is mapped, not read: a million images open in a fraction of a second, and the processes of a machine share one
copy. It holds a fixed header, a JSON description and the arrays, under two CRC-32 sums, and nothing to execute. Image i
of a source keeps its position as long as the source does not change.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cjepa_fast.cache import write_atomically
from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import STARTS, BadImage, inspect, no_image
from cjepa_fast.feed.shards import ShardFault, ShardReader
from cjepa_fast.feed.sources import printable

MAGIC = b"CJEPA manifest 1"
_PREFIX = struct.Struct("<16sQII")  # magic, bytes of the description, its crc32, the arrays' crc32
_ALIGN = 64

# Errors of storage that may pass; seconds before each further try; seconds after a vain last try in which every image
# gets one try only
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EAGAIN}
_PAUSES_S = (0.1, 1.0, 5.0)
_HOPELESS_S = 30.0

log = logging.getLogger(__name__)

ENTRY = np.dtype(
    [
        ("offset", "<u8"),  # first byte in a tar, row in a parquet file, else 0
        ("bytes", "<u4"),  # encoded
        ("width", "<u4"),  # pixels, after the EXIF orientation
        ("height", "<u4"),
        ("crc32", "<u4"),  # of the encoded bytes; 0 in a quick manifest
        ("container", "<u4"),  # folder or shard
        ("label", "<i4"),  # index into classes, -1 without
        ("format", "u1"),  # index into images.FORMATS
    ]  # packed: padding would hold arbitrary bytes, so two manifests of one source would differ
)


class ManifestError(Exception):
    """A file that cannot be read, is no manifest, or is damaged."""


class SampleError(UserError):
    """A sample that cannot be read as it was indexed; `sample` is its id."""

    def __init__(self, sample: int, message: str) -> None:
        super().__init__(message)
        self.sample = sample


class Strings:
    """Many short strings in one array of bytes; undecodable bytes of file names survive."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self.blob, self.ends = blob, ends
        self._bytes = blob.data  # slices of a memoryview cost a third of an array's

    @classmethod
    def pack(cls, strings: Sequence[str]) -> Strings:
        """Pack strings into one array."""
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        ends = np.cumsum(np.fromiter(map(len, encoded), dtype=np.uint64, count=len(encoded)), dtype=np.uint64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        return self.several(np.array([i]))[0]

    def several(self, ids: np.ndarray) -> list[str]:
        """Return the strings at positions `ids`."""
        starts, ends = np.where(ids > 0, self.ends[ids - 1], 0).tolist(), self.ends[ids].tolist()
        data = self._bytes
        return [str(data[start:end], "utf-8", "surrogateescape") for start, end in zip(starts, ends, strict=True)]

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Manifest:
    """The usable images of one source; ids are positions.

    Args:
        meta: root, kind, base, mode, max_pixels, description, classes, left_out, pattern; plain JSON.
        entries: ENTRY [n].
        names, containers: file or member names [n]; folders or shards, relative to `base`.
        watched, stamps: files and folders, and their `sources.stamp` when indexed, int64 [k, 2].
    """

    def __init__(
        self, meta: dict[str, Any], entries: np.ndarray, names: Strings, containers: Strings, watched: Strings,
        stamps: np.ndarray,
    ) -> None:  # fmt: skip
        assert entries.dtype == ENTRY and len(names) == len(entries) and stamps.shape == (len(watched), 2)
        self.meta, self.entries, self.names = meta, entries, names
        self.containers, self.watched, self.stamps = containers, watched, stamps
        self.root: str = meta["root"]
        self.kind: str = meta["kind"]
        self.base: str = meta["base"]
        self.description: str = meta["description"]
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self._hopeless_until = 0.0
        self._container_of, self._bytes_of, self._offset_of = (entries[c] for c in ("container", "bytes", "offset"))
        self._container_paths: dict[int, str] = {}
        self._shards = ShardReader()

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Height and width in pixels after the EXIF orientation, int32 [n, 2]."""
        return np.stack([self.entries["height"], self.entries["width"]], axis=1).astype(np.int32)

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Indices into `classes`, int64 [n]; None if any image has no label."""
        return self.entries["label"].astype(np.int64) if self.classes else None

    def path(self, i: int) -> str:
        """Return the file of image i: the image itself, or its shard."""
        return self._paths(np.array([i]))[0]

    def _paths(self, ids: np.ndarray) -> list[str]:
        containers = map(self._container, self._container_of[ids].tolist())
        if self.kind in ("folder", "list"):
            return [container + name for container, name in zip(containers, self.names.several(ids), strict=True)]
        return list(containers)

    def _container(self, k: int) -> str:
        """Return the path of a shard, or that of a folder with a slash behind it."""
        if (container := self._container_paths.get(k)) is None:
            slash = [""] if self.kind in ("folder", "list") else []
            self._container_paths[k] = container = os.path.join(self.base, self.containers[k], *slash)
        return container

    def name(self, i: int) -> str:
        """Return the name of image i for a message: its path, with the member or row of a shard."""
        where = printable(self.path(i))
        if self.kind == "tar":
            return f"{where}: {printable(self.names[i])} at byte {self.entries['offset'][i]:,}"
        return f"{where}: row {self.entries['offset'][i]:,}" if self.kind == "parquet" else where

    def read(self, i: int, *, verify: bool = False) -> bytes:
        """Read the encoded bytes of image i. May be called from several threads, and after a fork.

        A tar is read at the image's offset, through a bounded number of open files. A parquet file is read by row
        groups, of which the last few are kept: a random order is slow unless they are small. After an error of the
        storage that may pass, three more tries follow in six seconds, unless those for another image just failed.

        Args:
            verify: compare the CRC-32 with that of a thorough index too, not only the length.

        Raises:
            SampleError: the image cannot be read, or is not the one that was indexed.
        """
        (data,) = self.read_many(np.array([i]))
        if isinstance(data, SampleError):
            raise data
        if verify and self.meta["mode"] == "thorough" and zlib.crc32(data) != self.entries["crc32"][i]:
            raise self._changed(i)
        return data

    def read_many(self, ids: np.ndarray) -> list[bytes | SampleError]:
        """Read images `ids` one after another: for each its bytes, or the error of `read`.

        Looks places up for all images at once, as tens of thousands of small images are read a second.
        """
        sizes, offsets = self._bytes_of[ids].tolist(), self._offset_of[ids].tolist()
        found: list[bytes | SampleError] = []
        for i, path, offset, size in zip(ids.tolist(), self._paths(ids), offsets, sizes, strict=True):
            try:
                try:
                    data = self._bytes(path, offset, size)
                except (OSError, ShardFault, IndexError) as error:
                    data = self._retry(i, path, offset, size, error)
                if len(data) != size:
                    raise self._changed(i)
                if not data.startswith(STARTS):
                    raise SampleError(i, f"{self.name(i)}: {no_image(data).detail}")
            except SampleError as error:
                found.append(error)
            else:
                found.append(data)
        return found

    def _retry(self, i: int, path: str, offset: int, size: int, error: Exception) -> bytes:
        """Read an image again after `error`, if another try makes sense. Raises SampleError."""
        for pause in (*_PAUSES_S, None):
            cause = error.__context__ if isinstance(error, ShardFault) else error  # of pyarrow
            reason = getattr(error, "strerror", None) or error
            transient = getattr(cause, "errno", None) in _TRANSIENT
            if pause is None or not transient or time.monotonic() < self._hopeless_until:
                break
            log.warning("%s: %s; trying again in %g s", self.name(i), reason, pause)
            self.close()  # an open shard may be stale
            time.sleep(pause)
            try:
                return self._bytes(path, offset, size)
            except (OSError, ShardFault, IndexError) as another:
                error = another
        if transient:
            self._hopeless_until = time.monotonic() + _HOPELESS_S
        message = f"{self.name(i)}: cannot be read any more ({reason}); restore it or index again"
        raise SampleError(i, message)

    def _changed(self, i: int) -> SampleError:
        return SampleError(i, f"{self.name(i)}: changed since it was indexed; restore it or index again")

    def fault(self, i: int) -> str | None:
        """Return why image i cannot be used now, or None if the check of a thorough index finds it sound."""
        try:
            header = inspect(self.read(i, verify=True), max_pixels=self.meta["max_pixels"])
        except SampleError as error:
            return str(error)
        except BadImage as error:
            return f"{self.name(i)}: {error.detail}"
        entry = self.entries[i]
        then = int(entry["format"]), int(entry["width"]), int(entry["height"])
        return None if tuple(header) == then else f"{self.name(i)}: changed since it was indexed"

    def _bytes(self, path: str, offset: int, size: int) -> bytes:
        if self.kind == "parquet":
            return self._shards.row(path, offset)
        return self._shards.member(path, offset, size) if self.kind == "tar" else read_file(path, size)

    def close(self) -> None:
        """Close all open shards; reading opens them again."""
        self._shards.close()

    def save(self, path: Path) -> None:
        """Write the manifest to a file, which appears complete or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        arrays = self._arrays()
        layout, offset = [], 0
        for array in arrays:
            layout.append([offset, array.nbytes])
            offset += -(-array.nbytes // _ALIGN) * _ALIGN
        # ASCII, as a folder's name may hold bytes that are no text
        head = json.dumps({"meta": self.meta, "layout": layout}, ensure_ascii=True).encode()
        head += b" " * (-(_PREFIX.size + len(head)) % _ALIGN)
        body = b"".join(a.tobytes() + bytes(-a.nbytes % _ALIGN) for a in arrays)
        prefix = _PREFIX.pack(MAGIC, len(head), zlib.crc32(head), zlib.crc32(body))
        write_atomically(path, (prefix, head, body))

    def _arrays(self) -> list[np.ndarray]:
        strings = (self.names, self.containers, self.watched)
        return [self.entries, self.stamps, *itertools.chain(*((s.blob, s.ends) for s in strings))]

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Map a manifest file.

        Raises:
            ManifestError: the file cannot be read, is no manifest of this version, or is damaged.
        """
        try:
            with open(path, "rb") as file:
                prefix = file.read(_PREFIX.size)
                if not prefix.startswith(MAGIC):
                    raise ManifestError("is not a manifest")
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise ManifestError(f"cannot be read ({error.strerror})") from None
        if len(prefix) < _PREFIX.size:
            raise ManifestError("is damaged")
        _, head_bytes, head_crc, body_crc = _PREFIX.unpack(prefix)
        start = _PREFIX.size + head_bytes
        head, body = mapped[_PREFIX.size : start], mapped[start:]
        if zlib.crc32(head) != head_crc or zlib.crc32(body) != body_crc:
            raise ManifestError("is damaged")
        description = json.loads(bytes(head))
        dtypes = [ENTRY, np.dtype("<i8"), *[np.dtype(np.uint8), np.dtype("<u8")] * 3]
        arrays = [
            np.frombuffer(body[at : at + length], dtype=dtype)
            for (at, length), dtype in zip(description["layout"], dtypes, strict=True)
        ]
        entries, stamps, *strings = arrays
        names, containers, watched = (Strings(*strings[i : i + 2]) for i in (0, 2, 4))
        return cls(description["meta"], entries, names, containers, watched, stamps.reshape(-1, 2))


def is_manifest(path: str) -> bool:
    """Return whether a path is a file that starts as a manifest does."""
    try:
        return os.path.isfile(path) and read_file(path, len(MAGIC)).startswith(MAGIC)
    except OSError:
        return False


def read_file(path: str, size: int) -> bytes:
    """Read a file that should have `size` bytes: one more if it is longer, fewer if it is shorter. Raises OSError.

    Makes few system calls, as each releases the interpreter's lock. Need not ask for a regular file: never waits at a
    pipe, and never reads more.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        data = os.read(fd, size + 1)
        while len(data) < size and (more := os.read(fd, size + 1 - len(data))):
            data += more
        return data
    finally:
        os.close(fd)
