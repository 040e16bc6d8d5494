"""Scans: reading the header, or every byte, of each listed image, in chunks that the workers of a pool take."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import Literal

import numpy as np

from cjepa_fast.feed.images import MAX_BYTES, BadImage, check_bytes, inspect, inspect_header
from cjepa_fast.feed.listing import Listing
from cjepa_fast.feed.manifest import ENTRY
from cjepa_fast.feed.shards import ShardFault, open_regular, open_tar, row_group_bounds, row_group_images
from cjepa_fast.feed.sources import Source

Mode = Literal["quick", "thorough"]  # headers, or every byte
Scanned = tuple[np.ndarray, dict[int, tuple[str, str]]]  # ENTRY rows; (reason, detail) by row
_Reader = Callable[[int], tuple[bytes, int]]  # limit to an image's first bytes, no more than that, and its whole size

_CHUNK = 256  # images per task: below it, handing tasks over costs more than the headers
_ROWS = 4096  # the same for parquet, where a task reads whole row groups
_START = 2**14  # bytes that hold nearly every header


def scan(
    source: Source, listing: Listing, *, mode: Mode, max_pixels: int, pool: Executor
) -> Iterable[tuple[int, Scanned]]:
    """Return (position of the first image, result) of each chunk in order; `pool` gets all chunks at once."""
    by_shard = source.kind in ("tar", "parquet")
    ends = (np.flatnonzero(np.diff(listing.container)) + 1).tolist() if by_shard else []  # of shards
    chunk = _ROWS if source.kind == "parquet" else _CHUNK
    spans = [
        slice(start, min(start + chunk, stop))
        for first, stop in itertools.pairwise([0, *ends, len(listing.name)])
        for start in range(first, stop, chunk)
    ]

    def task(span: slice) -> tuple[str, list, list]:
        containers = [listing.containers[c] for c in listing.container[span]]
        if by_shard:
            return os.path.join(source.base, containers[0]), listing.offset[span], listing.size[span]
        return source.base, containers, listing.name[span]

    worker = {"tar": inspect_members, "parquet": inspect_rows}.get(source.kind, inspect_files)
    results = pool.map(partial(worker, mode=mode, max_pixels=max_pixels), map(task, spans))
    return zip((span.start for span in spans), results, strict=True)


def inspect_files(task: tuple[str, list[str], list[str]], *, mode: Mode, max_pixels: int) -> Scanned:
    """Inspect images in files of their own; task: base, their folders below it, their names."""
    base, folders, names = task

    def read(path: str, limit: int) -> tuple[bytes, int]:
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            return (b"" if size > MAX_BYTES else os.pread(fd, min(size, limit), 0)), size
        finally:
            os.close(fd)

    paths = (os.path.join(base, folder, name) for folder, name in zip(folders, names, strict=True))
    return _inspect((partial(read, path) for path in paths), len(names), mode, max_pixels)


def inspect_members(task: tuple[str, list[int], list[int]], *, mode: Mode, max_pixels: int) -> Scanned:
    """Inspect images in one tar; task: its path, their offsets, their sizes in bytes."""
    path, offsets, sizes = task

    def read(offset: int, size: int, limit: int) -> tuple[bytes, int]:
        return (b"" if size > MAX_BYTES else os.pread(fd, min(size, limit), offset)), size

    try:
        with open_tar(path) as fd:
            return _inspect(map(partial(partial, read), offsets, sizes), len(sizes), mode, max_pixels)
    except ShardFault as fault:
        return _inspect([partial(_fail, fault)] * len(sizes), len(sizes), mode, max_pixels)


def inspect_rows(task: tuple[str, list[int], list[int]], *, mode: Mode, max_pixels: int) -> Scanned:
    """Inspect images in consecutive rows of one parquet file; task: its path, the rows, nothing of meaning."""
    path, rows, _ = task

    def read(data: bytes | None, limit: int) -> tuple[bytes, int]:
        if data is None:
            raise BadImage("missing", "the row holds no bytes")
        return data[:limit], len(data)

    def readers() -> Iterator[_Reader]:  # one row group in memory at a time
        try:
            bounds = row_group_bounds(path)
        except ShardFault as fault:
            yield from [partial(_fail, fault)] * len(rows)
            return
        for group, (start, stop) in enumerate(itertools.pairwise(bounds)):
            low, high = max(rows[0], start), min(rows[-1] + 1, stop)
            if low >= high:
                continue
            try:
                column = row_group_images(path, group).slice(low - start, high - low)
            except ShardFault as fault:
                yield from [partial(_fail, fault)] * (high - low)
            else:
                yield from (partial(read, data.as_py()) for data in column)

    return _inspect(readers(), len(rows), mode, max_pixels)


def _fail(fault: ShardFault, limit: int) -> tuple[bytes, int]:
    raise BadImage("bad shard", str(fault))


def _inspect(readers: Iterable[_Reader], n: int, mode: Mode, max_pixels: int) -> Scanned:
    """Inspect n images, each given by its reader."""
    entries = np.zeros(n, dtype=ENTRY)
    faults: dict[int, tuple[str, str]] = {}
    rows = []
    for i, read in enumerate(readers):
        crc = size = 0
        header = None
        try:
            if mode == "quick":
                data, size = read(_START)
                header = inspect_header(data, size, max_pixels=max_pixels)
            if header is None:
                data, size = read(MAX_BYTES)
                check_bytes(size)
                header = inspect(data, max_pixels=max_pixels, thorough=mode == "thorough")
                crc = zlib.crc32(data) if mode == "thorough" else 0
            rows.append((i, size, header.width, header.height, crc, header.format))
        except BadImage as bad:
            faults[i] = bad.reason, bad.detail
        except FileNotFoundError:
            faults[i] = "missing", "no such file"
        except OSError as error:
            odd = error.strerror is None  # raised by open_regular
            faults[i] = ("not a file", str(error)) if odd else ("unreadable", f"cannot be read ({error.strerror})")
    if rows:
        at, *columns = (list(column) for column in zip(*rows, strict=True))
        for name, column in zip(("bytes", "width", "height", "crc32", "format"), columns, strict=True):
            entries[name][at] = column
    return entries, faults
