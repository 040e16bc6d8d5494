"""The index: a manifest of the usable images of a source, read from the cache or made now."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from cjepa_fast.cache import cache_directory
from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import MAX_BYTES, MAX_PIXELS, BadImage, check_bytes, inspect, inspect_header
from cjepa_fast.feed.manifest import (
    ENTRY,
    MAGIC,
    Manifest,
    ManifestError,
    Mixture,
    Strings,
    read_file,
    row_group_images,
    row_group_starts,
    write_atomically,
)  # fmt: skip
from cjepa_fast.feed.shards import ShardFault, list_parquet, list_tar, open_regular, parquet_file
from cjepa_fast.feed.sources import (
    Listing,
    Rejected,
    Source,
    count,
    expand_pattern,
    find_source,
    list_folder,
    list_paths,
    parse_root,
    printable,
    stamp,
)  # fmt: skip

Mode = Literal["quick", "thorough"]
Fault = tuple[str, str]  # reason, detail
_Inspected = tuple[int, tuple[np.ndarray, dict[int, Fault]]]
_Reader = Callable[[int], tuple[bytes, int]]  # limit to an image's first bytes, at most so many, and its whole size

log = logging.getLogger(__name__)

_CHUNK = 256  # images per task: below it handing tasks over costs more than the headers
_ROWS = 4096  # the same for parquet, where a task reads whole row groups
_START = 2**14  # bytes that hold nearly every header
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def open_sources(
    roots: Sequence[str], *, mode: Mode = "quick", max_pixels: int = MAX_PIXELS, threads: int | None = None
) -> Mixture:
    """The manifests of `PATH[=WEIGHT]` roots: as cached if nothing changed, else indexed now, by threads.

    Says in one line what it did. A root may be a manifest file. Where several processes start at once, one indexes
    and the others wait for it.

    Raises:
        UserError: a root holds no usable image, the cache cannot be written, or a manifest given is out of date.
    """
    parsed = [parse_root(root) for root in roots]
    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        manifests = [_ensure(path, mode=mode, max_pixels=max_pixels, pool=pool) for path, _ in parsed]
    mixture = Mixture(manifests, [weight for _, weight in parsed])
    if any(round(weight * len(m)) == 0 for m, weight in zip(manifests, mixture.weights, strict=True)):
        raise UserError(f"{' '.join(roots)}: a weight is so small that an epoch visits none of its images; raise it")
    return mixture


def save_sources(mixture: Mixture, folder: Path) -> None:
    """Keep the manifests of a run, so that it can go on with them whatever becomes of its sources.

    Raises:
        UserError: they cannot be written.
    """
    for k, manifest in enumerate(mixture.manifests):
        manifest.save(folder / f"{k}")


def reopen_sources(roots: Sequence[str], folder: Path) -> Mixture:
    """The manifests that `save_sources` kept, for the same roots, or for where these have moved.

    A source that has changed since is read as it was indexed then, and a line says so.

    Raises:
        UserError: the manifests are not there or damaged, or a root that moved is of another kind.
    """
    manifests = []
    for k, (path, _) in enumerate(map(parse_root, roots)):
        try:
            manifest = Manifest.load(folder / f"{k}")
        except (OSError, ManifestError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{folder / str(k)}: the run's index of {printable(path)}: {reason}; restore it") from None
        if path != manifest.root and not _is_manifest(path):
            source = find_source(path)
            if source.kind != manifest.kind:
                raise UserError(f"{printable(path)}: is a {source.kind}, the run began with a {manifest.kind}")
            manifest.base = source.base
        elif fault := staleness(manifest):
            log.info("%s, and is read as it was then", fault)
        manifests.append(manifest)
    return Mixture(manifests, [weight for _, weight in map(parse_root, roots)])


def cached_manifest(root: str, *, mode: Mode, max_pixels: int) -> Path:
    """Where the manifest of a root lies in the cache; its report is beside it."""
    key = json.dumps([os.path.abspath(root), mode, max_pixels])
    return cache_directory() / "manifests" / hashlib.sha256(key.encode()).hexdigest()[:20] / "manifest"


def _ensure(root: str, *, mode: Mode, max_pixels: int, pool: Executor) -> Manifest:
    if _is_manifest(root):
        return _given(root)
    for accepted in ("thorough", mode):  # who asks for a quick index is served by a thorough one
        manifest, _ = _cached(cached_manifest(root, mode=accepted, max_pixels=max_pixels))
        if manifest is not None and (fault := staleness(manifest)) is None:
            return manifest
    out = cached_manifest(root, mode=mode, max_pixels=max_pixels)
    with _locked(out):
        manifest, why = _cached(out)  # another process may have written it meanwhile
        if manifest is not None and (fault := staleness(manifest)) is None:
            return manifest
        source = find_source(root)  # before a word is said: bad input is one line
        log.info("indexing %s%s", printable(root), f": {fault if manifest else why}" if manifest or why else "")
        manifest, rejected = build(source, mode=mode, max_pixels=max_pixels, pool=pool)
        report = out.with_name("bad_samples.jsonl")
        write_report(report, rejected)
        manifest.save(out)
        log.info("%s", summary(manifest, report))
        return manifest


def _is_manifest(root: str) -> bool:
    try:
        return os.path.isfile(root) and read_file(root, len(MAGIC)).startswith(MAGIC)
    except OSError:
        return False


def _given(root: str) -> Manifest:
    try:
        manifest = Manifest.load(Path(root))
    except ManifestError as error:
        raise UserError(f"{printable(root)}: {error}; index the images again") from None
    if fault := staleness(manifest):
        raise UserError(f"{printable(root)}: {fault}; index the images again")
    return manifest


def _cached(path: Path) -> tuple[Manifest | None, str]:
    try:
        return Manifest.load(path), ""
    except FileNotFoundError:
        return None, ""
    except ManifestError as error:
        return None, f"{path} {error}"
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror})"


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out.with_name("lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{out.parent}: the cache cannot be written ({error.strerror}); point CJEPA_CACHE to another folder"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def staleness(manifest: Manifest) -> str | None:
    """Why the source is no longer what was indexed, None if it seems unchanged.

    Compares the times of all folders, and the times and sizes of shards and lists: sees files added, removed, renamed
    or replaced, not a file of a folder or list that was written over in place; `Manifest.read` notices that when the
    length differs.
    """
    for path, expected in zip(manifest.watched, manifest.stamps.tolist(), strict=True):
        try:
            now = stamp(path)
        except OSError as error:
            return f"{printable(path)} cannot be found any more ({error.strerror})"
        if now != tuple(expected):
            return f"{printable(path)} changed since it was indexed"
    pattern = manifest.meta["pattern"]
    if pattern and expand_pattern(pattern) != list(manifest.watched):
        return f"{printable(pattern)} stands for other files than it did"
    return None


# --- building


def build(
    source: Source, *, mode: Mode, max_pixels: int = MAX_PIXELS, pool: Executor, progress: bool | None = None
) -> tuple[Manifest, list[Rejected]]:
    """Read the headers (quick) or all bytes (thorough) of a source's images, in `pool`.

    Args:
        progress: show a bar; None shows it on a terminal.

    Returns:
        The manifest of the usable images, and what was left out.

    Raises:
        UserError: there is no usable image.
    """
    listing = _list(source, pool)
    n = len(listing.name)
    table = np.zeros(n, dtype=ENTRY)
    table["offset"], table["container"] = listing.offset, listing.container
    rejected = list(listing.rejected)
    good = np.ones(n, dtype=bool)
    for start, (entries, faults) in _progress(_inspected(source, listing, mode, max_pixels, pool), n, progress):
        span = slice(start, start + len(entries))
        for column in ("bytes", "width", "height", "crc32", "format"):
            table[column][span] = entries[column]
        for i, (reason, detail) in faults.items():
            good[start + i] = False
            rejected.append(_reject(source, listing, start + i, reason, detail))
    keep = np.flatnonzero(good).tolist()
    classes, table["label"], label_note = _labels(listing, keep)
    if not keep:
        raise UserError(_nothing(source, rejected))
    used = {c: i for i, c in enumerate(sorted({listing.container[i] for i in keep}))}
    entries = table[keep]
    entries["container"] = [used[listing.container[i]] for i in keep]
    reasons = Counter(r.reason for r in rejected)
    meta = {
        "root": source.root,
        "kind": source.kind,
        "base": source.base,
        "mode": mode,
        "max_pixels": max_pixels,
        "classes": list(classes),
        "left_out": dict(sorted(reasons.items())),
        "pattern": source.pattern,
        "description": _describe(len(keep), listing, label_note, reasons),
    }
    manifest = Manifest(
        meta,
        entries,
        Strings.pack([listing.name[i] for i in keep]),
        Strings.pack([listing.containers[c] for c in used]),
        Strings.pack(list(source.stamps)),
        np.array(list(source.stamps.values()), dtype="<i8").reshape(-1, 2),
    )
    return manifest, rejected


def _list(source: Source, pool: Executor) -> Listing:
    if source.kind == "folder":
        return list_folder(source)
    if source.kind == "list":
        return list_paths(source)
    listing = Listing(ignored=source.ignored)
    lister = list_tar if source.kind == "tar" else list_parquet
    for part in pool.map(lister, [source.base] * len(source.files), source.files):
        listing.extend(part)
    noun = "tar shard" if source.kind == "tar" else "parquet file"
    listing.where = count(len(source.files), noun)
    return listing


def _labels(listing: Listing, keep: list[int]) -> tuple[tuple[str, ...], np.ndarray, str]:
    """Class names, int32 [n] indices into them (-1 without), and what to say about them."""
    none = (), np.full(len(listing.label), -1, dtype=np.int32)
    kept = [listing.label[i] for i in keep]
    missing = sum(label is None for label in kept)
    if missing == len(kept):
        return *none, ", no labels"
    if missing:
        return *none, f", labels not used as {missing:,} of them lack one"
    texts = [str(label) for label in kept]
    numbers = [int(t) for t in texts] if all(t.removeprefix("-").isdecimal() for t in texts) else []
    if listing.classes is not None:
        if not all(0 <= i < len(listing.classes) for i in numbers) or not numbers:
            return *none, ", labels not used as some are outside their list of names"
        classes, places = listing.classes, numbers
    else:
        values = sorted(set(numbers or texts))  # pyright: ignore[reportArgumentType]
        index = {value: i for i, value in enumerate(values)}
        classes, places = tuple(map(str, values)), [index[value] for value in numbers or texts]
    labels = none[1]
    labels[keep] = places
    return classes, labels, "" if listing.where.endswith("class folders") else f", {count(len(classes), 'label')}"


def _describe(n: int, listing: Listing, label_note: str, reasons: Counter[str]) -> str:
    ignoring = f"; {count(listing.ignored, 'other file')} ignored" if listing.ignored else ""
    left = ", ".join(f"{k:,} {reason}" for reason, k in reasons.most_common())
    left_out = f"; {reasons.total():,} left out ({left})" if left else ""
    return f"{count(n, 'image')} in {listing.where}{label_note}{ignoring}{left_out}"


def _nothing(source: Source, rejected: list[Rejected]) -> str:
    shown = printable(source.root)
    if not rejected:
        return f"{shown}: holds no image; give a folder, shards or a list that does"
    first = rejected[0]
    where = printable(": ".join(filter(None, (first.file, first.member))))
    others = f", and {len(rejected) - 1:,} more" if len(rejected) > 1 else ""
    return f"{shown}: holds no usable image: {where}: {first.detail}{others}; remove or replace what is bad"


def _reject(source: Source, listing: Listing, i: int, reason: str, detail: str) -> Rejected:
    parts = [source.base, listing.containers[listing.container[i]]]
    if source.kind in ("folder", "list"):
        return Rejected(os.path.join(*parts, listing.name[i]), "", reason, detail)
    member = listing.name[i] if source.kind == "tar" else f"row {listing.offset[i]}"
    return Rejected(os.path.join(*parts), member, reason, detail)


def _progress(results: Iterable[_Inspected], total: int, show: bool | None) -> Iterator[_Inspected]:
    from tqdm import tqdm

    with tqdm(total=total, unit=" images", unit_scale=True, disable=None if show is None else not show) as bar:
        for start, (entries, faults) in results:
            bar.update(len(entries))
            yield start, (entries, faults)


def _inspected(source: Source, listing: Listing, mode: Mode, max_pixels: int, pool: Executor) -> Iterable[_Inspected]:
    """(first position, (ENTRY rows, faults by row)) of consecutive images; all is handed to `pool` at once."""
    by_shard = source.kind in ("tar", "parquet")
    starts, tasks = [], []
    start, n = 0, len(listing.name)
    while start < n:
        stop = min(start + (_ROWS if source.kind == "parquet" else _CHUNK), n)
        containers = listing.container[start:stop]
        if by_shard and containers[-1] != containers[0]:
            stop = start + next(i for i, c in enumerate(containers) if c != containers[0])
        if by_shard:
            shard = os.path.join(source.base, listing.containers[containers[0]])
            tasks.append((shard, listing.offset[start:stop], listing.size[start:stop]))
        else:
            folders = [listing.containers[c] for c in containers]
            tasks.append((source.base, folders, listing.name[start:stop]))
        starts.append(start)
        start = stop
    worker = {"tar": inspect_members, "parquet": inspect_rows}.get(source.kind, inspect_files)
    results = pool.map(partial(worker, mode=mode, max_pixels=max_pixels), tasks)
    return zip(starts, results, strict=True)


def _inspect(readers: Iterable[_Reader], n: int, mode: Mode, max_pixels: int) -> tuple[np.ndarray, dict[int, Fault]]:
    """ENTRY rows and faults of n images, each given by its reader."""
    entries = np.zeros(n, dtype=ENTRY)
    faults: dict[int, Fault] = {}
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
            odd = error.strerror is None
            faults[i] = ("not a file", str(error)) if odd else ("unreadable", f"cannot be read ({error.strerror})")
    if rows:
        at, *columns = (list(column) for column in zip(*rows, strict=True))
        for name, column in zip(("bytes", "width", "height", "crc32", "format"), columns, strict=True):
            entries[name][at] = column
    return entries, faults


def inspect_files(
    task: tuple[str, list[str], list[str]], *, mode: Mode, max_pixels: int
) -> tuple[np.ndarray, dict[int, Fault]]:
    """Images in files of their own; task: base, folders below it, names in these."""
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


def inspect_members(
    task: tuple[str, list[int], list[int]], *, mode: Mode, max_pixels: int
) -> tuple[np.ndarray, dict[int, Fault]]:
    """Images in one tar; task: its path, where they start, how many bytes they have."""
    path, offsets, sizes = task

    def read(offset: int, size: int, limit: int) -> tuple[bytes, int]:
        return (b"" if size > MAX_BYTES else os.pread(fd, min(size, limit), offset)), size

    try:
        fd = open_regular(path)
    except OSError as error:
        fault = "bad shard", f"cannot be read any more ({error.strerror or error})"
        return np.zeros(len(sizes), dtype=ENTRY), dict.fromkeys(range(len(sizes)), fault)
    try:
        return _inspect(map(partial(partial, read), offsets, sizes), len(sizes), mode, max_pixels)
    finally:
        os.close(fd)


def inspect_rows(
    task: tuple[str, list[int], list[int]], *, mode: Mode, max_pixels: int
) -> tuple[np.ndarray, dict[int, Fault]]:
    """Images in consecutive rows of one parquet file; task: its path, the rows, nothing."""
    path, rows, _ = task

    def read(data: bytes | None, limit: int) -> tuple[bytes, int]:
        if data is None:
            raise BadImage("missing", "the row holds no bytes")
        return data[:limit], len(data)

    def fail(fault: ShardFault, limit: int) -> tuple[bytes, int]:
        raise BadImage("bad shard", str(fault))

    def readers() -> Iterator[_Reader]:  # one row group in memory at a time
        try:
            parquet = parquet_file(path)
        except ShardFault as fault:
            yield from [partial(fail, fault)] * len(rows)
            return
        with parquet:
            starts = [*row_group_starts(parquet), parquet.metadata.num_rows]
            for group, (start, stop) in enumerate(itertools.pairwise(starts)):
                low, high = max(rows[0], start), min(rows[-1] + 1, stop)
                if low >= high:
                    continue
                try:
                    column = row_group_images(parquet, group).slice(low - start, high - low)
                except ShardFault as fault:
                    yield from [partial(fail, fault)] * (high - low)
                else:
                    yield from (partial(read, data.as_py()) for data in column)

    return _inspect(readers(), len(rows), mode, max_pixels)


def write_report(path: Path, rejected: Sequence[Rejected]) -> None:
    """One JSON object per sample or shard left out: file, member (of a shard), reason, detail. Empty if none was."""
    write_atomically(path, [json.dumps(r._asdict()).encode() + b"\n" for r in rejected])


def summary(manifest: Manifest, report: Path) -> str:
    where = f"; see {report}" if manifest.meta["left_out"] else ""
    return f"{printable(manifest.root)}: {manifest.description}{where}"
