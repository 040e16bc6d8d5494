"""Shards: tar archives and parquet files, how their images are listed and read.

Images are read by offset: nothing is ever extracted, unpickled or executed, and a member's name is only a label.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import itertools
import json
import os
import re
import stat
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import SUFFIXES
from cjepa_fast.feed.listing import LABEL_COLUMNS, Listing
from cjepa_fast.feed.sources import printable

_MAX_NAME = 2**16  # bytes of a tar member's name; file systems take 2**12 at most


class ShardFault(Exception):
    """A shard that cannot be read, or not to its end."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of its first byte
    size: int


def list_shard(kind: str, base: str, shard: str) -> Listing:
    """List the images of one shard, a tar or parquet file, without reading an image."""
    path = os.path.join(base, shard)
    listing = Listing(containers=[shard])
    try:
        (_list_tar if kind == "tar" else _list_parquet)(path, listing)
    except ShardFault as fault:
        listing.reject(path, "", "bad shard", str(fault))
    return listing


def open_regular(path: str) -> int:
    """Open a file for reading and return its descriptor. A pipe or device would wait for ever, or never end.

    Raises:
        OSError: the file cannot be opened, or is not a regular one.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError("not a regular file")
    return fd


@contextlib.contextmanager
def open_tar(path: str) -> Iterator[int]:
    """Open a tar and give its descriptor.

    Raises:
        ShardFault: the tar cannot be opened.
    """
    try:
        fd = open_regular(path)
    except OSError as error:
        raise ShardFault(f"cannot be read ({error.strerror or error})") from None
    try:
        yield fd
    finally:
        os.close(fd)


def tar_members(fd: int) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar (ustar, GNU or pax) from its headers alone.

    Raises:
        ShardFault: the file is no tar, or ends or is damaged before its end mark; members yielded before are sound.
    """
    end = os.fstat(fd).st_size
    if end == 0:
        raise ShardFault("is empty (0 bytes)")
    at = 0
    long_name: bytes | None = None
    long_size: int | None = None
    while True:
        block = os.pread(fd, 512, at)
        if len(block) < 512:
            raise ShardFault(f"ends at byte {end:,}, before its end mark")
        if not any(block):
            if at == 0 and end % 512:
                raise ShardFault("is not a tar")
            return
        if not _checksum_holds(block):
            if at == 0:
                packed = block[:2] == b"\x1f\x8b" or block[:3] == b"BZh" or block[:4] in (b"\xfd7zX", b"(\xb5/\xfd")
                raise ShardFault("is compressed; decompress it" if packed else "is not a tar")
            raise ShardFault(f"is damaged at byte {at:,}")
        size = _tar_number(block[124:136])
        kind, start = block[156:157], at + 512
        if kind in (b"0", b"\0", b"7") and long_size is not None:
            size = long_size
        if kind in b"123456":
            size = 0  # links, devices and folders have no data
        if kind == b"S":
            raise ShardFault("holds sparse members; pack it without --sparse")
        if size < 0:
            raise ShardFault(f"is damaged at byte {at:,}")
        at = start + -(-size // 512) * 512
        if kind in (b"L", b"x"):
            if size > _MAX_NAME or start + size > end:
                raise ShardFault(f"holds a name of {size:,} bytes at byte {start:,}")
            payload = os.pread(fd, size, start)
            if kind == b"L":
                long_name = payload.rstrip(b"\0")
            else:
                long_name, long_size = _pax(payload, long_name, long_size)
            continue
        if kind in (b"K", b"g"):
            continue
        if start + size > end:
            raise ShardFault(f"ends at byte {end:,}, inside a member")
        name = long_name or _tar_name(block)
        long_name = long_size = None
        if kind in (b"0", b"\0", b"7") and not name.endswith(b"/"):
            yield Member(name.decode("utf-8", "surrogateescape"), start, size)


def _checksum_holds(block: bytes) -> bool:
    try:
        stated = int(block[148:156].rstrip(b"\0 ").strip() or b"x", 8)
    except ValueError:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    return stated in (sum(rest), sum(b - 256 if b > 127 else b for b in rest))


def _tar_number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _tar_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(payload: bytes, name: bytes | None, size: int | None) -> tuple[bytes | None, int | None]:
    """Return the name and size in a pax header, or those given where the header has none."""
    while (match := re.match(rb"(\d{1,8}) ([^=]+)=", payload)) and int(match[1]) > len(match[0]):
        value = payload[len(match[0]) : int(match[1]) - 1]
        if match[2] == b"path":
            name = value
        elif match[2] == b"size" and value.isdigit():
            size = int(value)
        elif match[2].startswith(b"GNU.sparse"):
            raise ShardFault("holds sparse members; pack it without --sparse")
        payload = payload[int(match[1]) :]
    return name, size


def _list_tar(path: str, listing: Listing) -> None:
    """Add the samples of a tar: members whose names agree up to the first dot after the last slash.

    The image of a sample is its member with the plainest image ending. Its label is the integer in `.cls`, or under
    "label" in `.json`. Samples are in the order of their images; their members may lie apart.
    """
    images: dict[str, list[Member]] = {}
    labels: dict[str, Member] = {}
    keys: set[str] = set()
    with open_tar(path) as fd:
        try:
            for member in tar_members(fd):
                key, ending = _key(member.name)
                if os.path.basename(member.name).startswith("."):
                    listing.ignored += 1
                    continue
                keys.add(key)
                if ending.endswith(SUFFIXES):
                    images.setdefault(key, []).append(member)
                elif ending in (".cls", ".json"):
                    labels.setdefault(key + ending, member)
                else:
                    listing.ignored += 1
        except ShardFault as fault:
            listing.reject(path, "", "bad shard", str(fault))
        for key in sorted(keys - images.keys()):
            listing.reject(path, key, "no image", f"no {' '.join(SUFFIXES)} member of this name")
        samples = []
        for key, members in images.items():
            chosen = min(members, key=lambda m: (_key(m.name)[1].count("."), m.offset))
            for other in members:
                if other is not chosen and other.name == chosen.name:
                    detail = f"a second member of this name, at byte {other.offset:,}"
                    listing.reject(path, other.name, "duplicate", detail)
                elif other is not chosen:
                    listing.ignored += 1
            samples.append((chosen, _label(fd, labels.get(f"{key}.cls"), labels.get(f"{key}.json"))))
    for member, label in sorted(samples, key=lambda sample: sample[0].offset):
        listing.add(0, member.name, offset=member.offset, size=member.size, label=label)


def _key(name: str) -> tuple[str, str]:
    """Split a member's name before the first dot after its last slash, as WebDataset does; the ending in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return folder + slash + stem, (dot + ending).lower()


def _label(fd: int, cls: Member | None, meta: Member | None) -> int | None:
    """Return the label of a sample, or None if there is none or it cannot be read: the image is still of use."""
    try:
        if cls is not None and cls.size <= 32:
            return int(os.pread(fd, cls.size, cls.offset).decode("ascii"))
        if meta is not None and meta.size <= 2**20:
            label = json.loads(os.pread(fd, meta.size, meta.offset)).get("label")
            return label if type(label) is int else None
    except (ValueError, AttributeError, RecursionError):
        pass
    return None


def parquet_file(path: str) -> Any:
    """Return `pyarrow.parquet.ParquetFile(path)`.

    Raises:
        UserError: pyarrow is not installed.
        ShardFault: the file cannot be read.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{printable(path)}: needs pyarrow; pip install 'cjepa-fast[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise ShardFault(f"is not a readable parquet file ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return printable(str(error).strip().partition("\n")[0][:200])


def _image_column(parquet: Any) -> str:
    """Return the column of encoded images as a dotted path: `image.bytes` of a Hugging Face file, or a binary column.

    Raises:
        ShardFault: there is no such column, or there are several and none is called image.
    """
    types = importlib.import_module("pyarrow.types")

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    schema = parquet.schema_arrow
    found = {}
    for column in schema:
        if is_bytes(column.type):
            found[column.name] = column.name
        elif types.is_struct(column.type) and any(f.name == "bytes" and is_bytes(f.type) for f in column.type):
            found[column.name] = f"{column.name}.bytes"
    for name in ("image", "img", "jpg", *(found if len(found) == 1 else ())):
        if name in found:
            return found[name]
    raise ShardFault(f"has no image column; its columns are {', '.join(map(printable, schema.names)) or 'none'}")


def _list_parquet(path: str, listing: Listing) -> None:
    """Add the rows of a parquet file; integer labels get the names that a Hugging Face file has for them."""
    with parquet_file(path) as parquet:
        column = _image_column(parquet)
        schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        names: list[str | None] = [None] * rows
        labels: list[Any] = [None] * rows
        folder, dot, _ = column.partition(".")
        try:
            if dot and "path" in [f.name for f in schema.field(folder).type]:
                names = [r and r["path"] for r in parquet.read([f"{folder}.path"]).column(0).to_pylist()]
            if label := next((name for name in LABEL_COLUMNS if name in schema.names), None):
                labels = parquet.read([label]).column(0).to_pylist()
                listing.classes = _class_names(schema.metadata, label)
        except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
            raise ShardFault(f"is damaged ({_first_line(error)})") from None
    for row, (name, label) in enumerate(zip(names, labels, strict=True)):
        listing.add(0, name or "", offset=row, label=label if type(label) in (int, str) else None)


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
        return tuple(map(str, names)) if isinstance(names, list) else None
    except (KeyError, TypeError, ValueError):
        return None


def row_group_bounds(path: str) -> list[int]:
    """Return the first row of each row group of a parquet file, and the number of rows. Raises ShardFault."""
    with parquet_file(path) as parquet:
        metadata = parquet.metadata
        rows = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return [0, *itertools.accumulate(rows)]


def row_group_images(path: str, group: int) -> Any:
    """Return the encoded images of one row group, a pyarrow array of bytes. Raises ShardFault."""
    with parquet_file(path) as parquet:
        column = _image_column(parquet)
        try:
            images = parquet.read_row_group(group, columns=[column], use_threads=False).column(0).combine_chunks()
            return images.field("bytes") if "." in column else images
        except (OSError, ValueError) as error:
            raise ShardFault(f"row group {group} is damaged ({_first_line(error)})") from None


class ShardReader:
    """Reads from several threads through a few open tars, and a few row groups kept in memory."""

    def __init__(self) -> None:
        self._tar = lru_cache(maxsize=64)(_Tar)
        self._bounds = lru_cache(maxsize=None)(row_group_bounds)
        self._group = lru_cache(maxsize=4)(row_group_images)
        self._lock = threading.Lock()

    def member(self, path: str, offset: int, size: int) -> bytes:
        """Read bytes of a tar. Raises OSError."""
        tar = self._tar(path)  # a reference, so that the file stays open for this read
        return os.pread(tar.fd, size, offset)

    def row(self, path: str, row: int) -> bytes:
        """Read the image in a row of a parquet file. Raises ShardFault, or IndexError in a file that became shorter."""
        with self._lock:  # else several threads would read the same row group
            bounds = self._bounds(path)
            group = bisect.bisect_right(bounds, row) - 1
            return self._group(path, group)[row - bounds[group]].as_py() or b""

    def close(self) -> None:
        """Close all tars and free all row groups; reading opens them again."""
        for cache in (self._tar, self._bounds, self._group):
            cache.cache_clear()


class _Tar:
    """An open file that closes with its last reference, so that no thread loses it in the middle of a read."""

    def __init__(self, path: str) -> None:
        self.fd = open_regular(path)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.fd)
