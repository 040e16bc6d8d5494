"""The manifest: where every image of a source lies, its size, format, checksum and label, in a few flat arrays.

A manifest is mapped, not read: a million images open in a fraction of a second, and the processes of a machine share
one copy. The file is a fixed header, a JSON description and the arrays, under two CRC-32 sums; there is nothing in it
to execute. Image i of a source keeps its place as long as the source does not change.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import json
import logging
import mmap
import os
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import STARTS, BadImage, inspect, no_image
from cjepa_fast.feed.shards import ShardFault, first_line, image_column, open_regular, parquet_file
from cjepa_fast.feed.sources import epoch_visits, printable

MAGIC = b"CJEPA manifest 1"
_PREFIX = struct.Struct("<16sQII")  # magic, bytes of the description, its crc32, the arrays' crc32
_ALIGN = 64

# Errors of storage that may pass, the seconds before each further try, and for how long after the last try in vain the
# other images get only one
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EAGAIN}
_PAUSES = (0.1, 1.0, 5.0)
_HOPELESS = 30.0
_HOW = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

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
    ]  # packed: padding would be copied as whatever lay there, and two manifests of one source would differ
)


class ManifestError(Exception):
    """A file is no manifest, or a damaged one."""


class SampleError(UserError):
    """A sample cannot be read as it was indexed; `sample` is its id."""

    def __init__(self, sample: int, message: str) -> None:
        super().__init__(message)
        self.sample = sample


class Strings:
    """Many short strings in one array of bytes; undecodable bytes of file names survive."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self.blob, self.ends = blob, ends
        self._bytes = blob.data  # a memoryview: slices of it cost a third of an array's

    @classmethod
    def pack(cls, strings: Sequence[str]) -> Strings:
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        ends = np.cumsum(np.fromiter(map(len, encoded), dtype=np.uint64, count=len(encoded)), dtype=np.uint64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        return self.several(np.array([i]))[0]

    def several(self, ids: np.ndarray) -> list[str]:
        starts, ends = np.where(ids > 0, self.ends[ids - 1], 0).tolist(), self.ends[ids].tolist()
        data = self._bytes
        return [str(data[start:end], "utf-8", "surrogateescape") for start, end in zip(starts, ends, strict=True)]

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Manifest:
    """The usable images of one source; ids are positions.

    Args:
        meta: root, kind, base, mode, max_pixels, description, classes, summary; plain JSON.
        entries: ENTRY [n].
        names, containers: file or member names [n]; folders or shards, relative to `base`.
        watched, stamps: files and folders, and their (mtime in ns, bytes) when indexed, int64 [k, 2].
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
        self._open = _OpenShards(64)
        self._row_groups = _RowGroups(4)

    def __len__(self) -> int:
        return len(self.entries)

    # --- columns

    @cached_property
    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: height and width in pixels as DALI shows them, after the EXIF orientation."""
        return np.stack([self.entries["height"], self.entries["width"]], axis=1).astype(np.int32)

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int64 [n], indices into `classes`; None if any image has none."""
        return self.entries["label"].astype(np.int64) if self.classes else None

    def path(self, i: int) -> str:
        """The file of image i: the image itself, or its shard."""
        (path,) = self._paths(np.array([i]))
        return path

    def _paths(self, ids: np.ndarray) -> list[str]:
        containers = map(self._container, self._container_of[ids].tolist())
        if self.kind in ("folder", "list"):
            return [container + name for container, name in zip(containers, self.names.several(ids), strict=True)]
        return list(containers)

    def _container(self, k: int) -> str:
        """The path of a shard, or of a folder with a slash behind it."""
        if (container := self._container_paths.get(k)) is None:
            slash = [""] if self.kind in ("folder", "list") else []
            self._container_paths[k] = container = os.path.join(self.base, self.containers[k], *slash)
        return container

    def name(self, i: int) -> str:
        """Image i for a message: a path, with the member or row of a shard."""
        where = printable(self.path(i))
        if self.kind == "tar":
            return f"{where}: {printable(self.names[i])} at byte {self.entries['offset'][i]:,}"
        return f"{where}: row {self.entries['offset'][i]:,}" if self.kind == "parquet" else where

    # --- bytes

    def read(self, i: int, *, verify: bool = False) -> bytes:
        """The encoded bytes of image i. May be called from several threads, and after a fork.

        Reads a tar at the image's offset through a bounded number of open files. A parquet file is read by the row
        group, of which the last few are kept: in a random order it is slow unless its row groups are small. An error of
        the storage that may pass is met with three more tries in six seconds, unless those for another image just
        failed.

        Args:
            verify: compare the CRC-32 with that of a thorough index too, not only the length.

        Raises:
            SampleError: it cannot be read, or is not what was indexed.
        """
        (data,) = self._read(np.array([i]))
        if isinstance(data, SampleError):
            raise data
        if verify and self.meta["mode"] == "thorough" and zlib.crc32(data) != self.entries["crc32"][i]:
            raise self._changed(i)
        return data

    def read_many(self, ids: np.ndarray) -> list[bytes | SampleError]:
        """As `read`, of images `ids` one after another: the bytes of each, or what is wrong with it.

        Tens of thousands of small images a second are read, so what can be looked up for all of them at once is.
        """
        return list(self._read(ids))

    def _read(self, ids: np.ndarray) -> Iterator[bytes | SampleError]:
        sizes, offsets = self._bytes_of[ids].tolist(), self._offset_of[ids].tolist()
        for i, path, offset, size in zip(ids.tolist(), self._paths(ids), offsets, sizes, strict=True):
            try:
                try:
                    data = self._bytes(path, offset, size)
                except (OSError, ShardFault, IndexError) as error:
                    data = self._retry(i, path, offset, size, error)
            except SampleError as error:
                yield error
            else:
                if len(data) != size:
                    yield self._changed(i)
                elif data.startswith(STARTS):
                    yield data
                else:
                    yield SampleError(i, f"{self.name(i)}: {no_image(data).detail}")

    def _retry(self, i: int, path: str, offset: int, size: int, error: Exception) -> bytes:
        """The bytes of an image that could not be read because of `error`. Raises SampleError."""
        for pause in (*_PAUSES, None):
            cause = error.__context__ if isinstance(error, ShardFault) else error  # what pyarrow met
            reason = getattr(error, "strerror", None) or error
            transient = getattr(cause, "errno", None) in _TRANSIENT
            if pause is None or not transient or time.monotonic() < self._hopeless_until:
                break
            log.warning("%s: %s; trying again in %g s", self.name(i), reason, pause)
            self.close()  # an open shard may be what is stale
            time.sleep(pause)
            try:
                return self._bytes(path, offset, size)
            except (OSError, ShardFault, IndexError) as another:
                error = another
        if transient:
            self._hopeless_until = time.monotonic() + _HOPELESS
        message = f"{self.name(i)}: cannot be read any more ({reason}); restore it or index again"
        raise SampleError(i, message)

    def _changed(self, i: int) -> SampleError:
        return SampleError(i, f"{self.name(i)}: changed since it was indexed; restore it or index again")

    def fault(self, i: int) -> str | None:
        """Why image i cannot be used now, None if it seems sound: the whole check of a thorough index."""
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
            return self._row_groups.row(path, offset)
        if self.kind == "tar":
            shard = self._open.get(path)  # held: it closes with its last user
            return os.pread(shard.fd, size, offset)
        return read_file(path, size)

    def close(self) -> None:
        """Close the shards that are open; reading opens them again."""
        self._open.clear()
        self._row_groups.clear()

    # --- the file

    def save(self, path: Path) -> None:
        """Write the manifest: it appears complete or not at all.

        Raises:
            UserError: it cannot be written.
        """
        arrays = self._arrays()
        layout, offset = [], 0
        for array in arrays:
            layout.append([offset, array.nbytes])
            offset += -(-array.nbytes // _ALIGN) * _ALIGN
        # ascii: a folder's name may hold bytes that are no text
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
            ManifestError: it is not one, of another version, or damaged.
            OSError: it cannot be opened.
        """
        with open(path, "rb") as file:
            prefix = file.read(_PREFIX.size)
            if prefix[: len(MAGIC)] != MAGIC:
                raise ManifestError("is not a manifest")
            if len(prefix) < _PREFIX.size:
                raise ManifestError("is damaged")
            _, head_bytes, head_crc, body_crc = _PREFIX.unpack(prefix)
            if _PREFIX.size + head_bytes > os.fstat(file.fileno()).st_size:
                raise ManifestError("is damaged")
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
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


class Mixture:
    """One or several manifests as one data set, with weights; ids run through them in order."""

    def __init__(self, manifests: Sequence[Manifest], weights: Sequence[float]) -> None:
        assert manifests and len(manifests) == len(weights)
        self.manifests, self.weights = tuple(manifests), tuple(weights)
        self.starts = [0, *itertools.accumulate(map(len, manifests))]
        self.sizes = np.concatenate([m.sizes for m in manifests])
        same = len({m.classes for m in manifests}) == 1
        self.classes = manifests[0].classes if same else ()
        labels = [m.labels for m in manifests]
        self.labels = np.concatenate([x for x in labels if x is not None]) if self.classes else None
        shares = (f"{m.description}, weight {w:g}" for m, w in zip(manifests, weights, strict=True))
        unused = "; labels not used as the sources name different classes"
        self.description = manifests[0].description if len(manifests) == 1 else "; ".join(shares)
        self.description += unused if not same else ""

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def visits(self) -> int:
        """How many images an epoch visits; len(self) with all weights 1."""
        return sum(round(weight * len(m)) for m, weight in zip(self.manifests, self.weights, strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """Of the names and sizes of all images in their order, and of the weights; not of where they lie."""
        crc = zlib.crc32(repr(self.weights).encode())
        for manifest in self.manifests:
            columns = (
                manifest.names.blob,
                manifest.names.ends,
                *(manifest.entries[c] for c in ("bytes", "height", "width")),
            )
            for column in columns:
                crc = zlib.crc32(column.tobytes(), crc)
        return f"{crc:08x}"

    def _locate(self, i: int) -> tuple[Manifest, int]:
        source = bisect.bisect_right(self.starts, i) - 1
        return self.manifests[source], i - self.starts[source]

    def source_of(self, ids: np.ndarray) -> np.ndarray:
        """Which manifest each id belongs to, int64."""
        return np.searchsorted(self.starts, ids, side="right") - 1

    def read(self, i: int, *, verify: bool = False) -> bytes:
        """As `Manifest.read`; a SampleError carries the id in the mixture."""
        manifest, at = self._locate(i)
        try:
            return manifest.read(at, verify=verify)
        except SampleError as error:
            raise SampleError(i, str(error)) from None

    def read_many(self, ids: np.ndarray) -> list[bytes | SampleError]:
        """As `Manifest.read_many`, the errors with ids in the mixture."""
        of = self.source_of(ids)
        found: list[bytes | SampleError] = [b""] * len(ids)
        for k in np.unique(of):
            places = np.flatnonzero(of == k)
            start = self.starts[k]
            for place, data in zip(places.tolist(), self.manifests[k].read_many(ids[places] - start), strict=True):
                found[place] = data if isinstance(data, bytes) else SampleError(data.sample + start, str(data))
        return found

    def path(self, i: int) -> str:
        manifest, at = self._locate(i)
        return manifest.path(at)

    def name(self, i: int) -> str:
        manifest, at = self._locate(i)
        return manifest.name(at)

    def fault(self, i: int) -> str | None:
        manifest, at = self._locate(i)
        return manifest.fault(at)

    def epoch(self, *, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids that an epoch visits and which visit of the id each is; see `sources.epoch_visits`."""
        return epoch_visits([len(m) for m in self.manifests], self.weights, seed=seed, epoch=epoch)


# --- files


def read_file(path: str, size: int) -> bytes:
    """A file that should have `size` bytes: one more if it is longer, fewer if it is shorter. Raises OSError.

    In as few system calls as can be, as each gives the interpreter's lock away. It need not ask whether the file is a
    regular one: it never waits at a pipe, and never reads more.
    """
    fd = os.open(path, _HOW)
    try:
        data = os.read(fd, size + 1)
        while len(data) < size and (more := os.read(fd, size + 1 - len(data))):
            data += more
        return data
    finally:
        os.close(fd)


def write_atomically(path: Path, pieces: Sequence[bytes]) -> None:
    """Raises UserError, and leaves what was there, if it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another place or free space") from None


class _Shard:
    """An open file that closes when nobody uses it any more, so that no thread loses it in the middle of a read."""

    def __init__(self, path: str) -> None:
        self.fd = open_regular(path)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.fd)


class _OpenShards:
    """The most recently used open files."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._shards: OrderedDict[str, _Shard] = OrderedDict()

    def get(self, path: str) -> _Shard:
        with self._lock:
            if shard := self._shards.get(path):
                self._shards.move_to_end(path)
                return shard
            self._shards[path] = shard = _Shard(path)
            if len(self._shards) > self._limit:
                self._shards.popitem(last=False)
            return shard

    def clear(self) -> None:
        with self._lock:
            self._shards.clear()


class _RowGroups:
    """The image columns of the most recently used row groups."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._starts: dict[str, list[int]] = {}  # first row of each row group
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def row(self, path: str, row: int) -> bytes:
        with self._lock:  # pyarrow's files are not for several threads at once
            if path not in self._starts:
                with parquet_file(path) as parquet:
                    self._starts[path] = row_group_starts(parquet)
            group = bisect.bisect_right(self._starts[path], row) - 1
            if (path, group) not in self._groups:
                with parquet_file(path) as parquet:
                    self._groups[path, group] = row_group_images(parquet, group)
                if len(self._groups) > self._limit:
                    self._groups.popitem(last=False)
            self._groups.move_to_end((path, group))
            return self._groups[path, group][row - self._starts[path][group]].as_py() or b""

    def clear(self) -> None:
        with self._lock:
            self._starts.clear()
            self._groups.clear()


def row_group_starts(parquet: Any) -> list[int]:
    """The first row of each row group of a `ParquetFile`."""
    metadata = parquet.metadata
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return [0, *itertools.accumulate(rows)][:-1]


def row_group_images(parquet: Any, group: int) -> Any:
    """The encoded images of one row group, a pyarrow array of bytes.

    Raises:
        ShardFault: the row group cannot be read.
    """
    column = image_column(parquet)
    try:
        images = parquet.read_row_group(group, columns=[column], use_threads=False).column(0).combine_chunks()
        return images.field("bytes") if "." in column else images
    except (OSError, ValueError) as error:
        raise ShardFault(f"row group {group} is damaged ({first_line(error)})") from None
