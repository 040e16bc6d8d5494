"""The index: a manifest of the usable images of each source, read from the cache or made now."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from cjepa_fast.cache import cache_directory, locked, write_atomically
from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import MAX_PIXELS
from cjepa_fast.feed.listing import Listing, Rejected, list_folder, list_paths
from cjepa_fast.feed.manifest import ENTRY, Manifest, ManifestError, Strings, is_manifest
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.feed.scan import Mode, Scanned, scan
from cjepa_fast.feed.shards import list_shard
from cjepa_fast.feed.sources import Source, count, expand_pattern, find_source, parse_root, printable, stamp

log = logging.getLogger(__name__)


def open_sources(
    roots: Sequence[str], *, mode: Mode = "quick", max_pixels: int = MAX_PIXELS, threads: int | None = None
) -> Mixture:
    """Return the images of `PATH[=WEIGHT]` roots: from the cache if nothing changed, else indexed now by threads.

    The log says what was done. A root may be a manifest file. Of several processes that start at once, one indexes and
    the others wait for it.

    Raises:
        UserError: a root holds no usable image, the cache cannot be written, or a given manifest is out of date.
    """
    parsed = [parse_root(root) for root in roots]
    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        manifests = [_open(path, mode, max_pixels, pool) for path, _ in parsed]
    mixture = Mixture(manifests, [weight for _, weight in parsed])
    if any(round(weight * len(m)) == 0 for m, weight in zip(manifests, mixture.weights, strict=True)):
        raise UserError(f"{' '.join(roots)}: a weight is so small that an epoch visits none of its images; raise it")
    return mixture


def _open(root: str, mode: Mode, max_pixels: int, pool: Executor) -> Manifest:
    if is_manifest(root):
        manifest, why = current(Path(root))
        if manifest is None:
            raise UserError(f"{printable(root)}: {why}; index the images again")
        return manifest
    out = cached_manifest(root, mode=mode, max_pixels=max_pixels)
    for path in (cached_manifest(root, mode="thorough", max_pixels=max_pixels), out):  # thorough serves quick too
        if (manifest := current(path)[0]) is not None:
            return manifest
    with locked(out.with_name("lock")):
        manifest, why = current(out)  # another process may have written it meanwhile
        if manifest is None:
            source = find_source(root)  # before the log says a word: bad input is one line
            log.info("indexing %s%s", printable(root), f": {why}" if why else "")
            report = out.with_name("bad_samples.jsonl")
            manifest = write_index(source, out, report, mode=mode, max_pixels=max_pixels, pool=pool)
            log.info("%s", summary(manifest, report))
        return manifest


def cached_manifest(root: str, *, mode: Mode, max_pixels: int) -> Path:
    """Return the place of a root's manifest in the cache; its report is beside it."""
    key = json.dumps([os.path.abspath(root), mode, max_pixels])
    return cache_directory() / "manifests" / hashlib.sha256(key.encode()).hexdigest()[:20] / "manifest"


def current(path: Path) -> tuple[Manifest | None, str]:
    """Return the manifest at `path` if its source is unchanged, else None and why, "" if there is no file."""
    if not path.exists():
        return None, ""
    try:
        manifest = Manifest.load(path)
    except ManifestError as error:
        return None, f"the index file {error}"
    why = staleness(manifest)
    return (None, why) if why else (manifest, "")


def staleness(manifest: Manifest) -> str | None:
    """Return why the source is no longer the one that was indexed, or None if it seems unchanged.

    Compares the times of all folders, and the times and sizes of shards and lists. So this sees files added, removed,
    renamed or replaced. A file of a folder or list that was written over in place is seen by `Manifest.read` alone, if
    its length differs.
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


def save_sources(mixture: Mixture, folder: Path) -> None:
    """Keep the manifests of a run, which can then go on with them even if its sources change.

    Raises:
        UserError: they cannot be written.
    """
    for k, manifest in enumerate(mixture.manifests):
        manifest.save(folder / f"{k}")


def reopen_sources(roots: Sequence[str], folder: Path) -> Mixture:
    """Return what `save_sources` kept, for the same roots, or for the places to which they moved.

    A source that changed since is read as it was indexed, and the log says so.

    Raises:
        UserError: the manifests are missing or damaged, or a root that moved is of another kind.
    """
    parsed, manifests = [parse_root(root) for root in roots], []
    for k, (path, _) in enumerate(parsed):
        try:
            manifest = Manifest.load(folder / f"{k}")
        except ManifestError as error:
            raise UserError(f"{folder / str(k)}: the run's index of {printable(path)} {error}; restore it") from None
        if path != manifest.root and not is_manifest(path):
            source = find_source(path)
            if source.kind != manifest.kind:
                raise UserError(f"{printable(path)}: is a {source.kind}, the run began with a {manifest.kind}")
            manifest.base = source.base
        elif why := staleness(manifest):
            log.info("%s, and is read as it was then", why)
        manifests.append(manifest)
    return Mixture(manifests, [weight for _, weight in parsed])


def write_index(source: Source, out: Path, report: Path, *, mode: Mode, max_pixels: int, pool: Executor) -> Manifest:
    """Index a source and write its manifest and the report of what was left out.

    The report has one JSON object per sample or shard: file, member (of a shard), reason, detail.

    Raises:
        UserError: there is no usable image, or a file cannot be written.
    """
    manifest, rejected = build(source, mode=mode, max_pixels=max_pixels, pool=pool)
    write_atomically(report, [json.dumps(r._asdict()).encode() + b"\n" for r in rejected])
    manifest.save(out)
    return manifest


def summary(manifest: Manifest, report: Path) -> str:
    """Return a line for the log: the root, its images, and where the report is if any were left out."""
    where = f"; see {report}" if manifest.meta["left_out"] else ""
    return f"{printable(manifest.root)}: {manifest.description}{where}"


def build(
    source: Source, *, mode: Mode, max_pixels: int = MAX_PIXELS, pool: Executor, progress: bool | None = None
) -> tuple[Manifest, list[Rejected]]:
    """Read the headers (quick) or all bytes (thorough) of a source's images in `pool`.

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
    results = scan(source, listing, mode=mode, max_pixels=max_pixels, pool=pool)
    for start, (entries, faults) in _progress(results, n, progress):
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
    if source.kind in ("folder", "list"):
        return list_folder(source) if source.kind == "folder" else list_paths(source)
    noun = "tar shard" if source.kind == "tar" else "parquet file"
    listing = Listing(ignored=source.ignored, where=count(len(source.files), noun))
    for part in pool.map(partial(list_shard, source.kind, source.base), source.files):
        listing.extend(part)
    return listing


def _labels(listing: Listing, keep: list[int]) -> tuple[tuple[str, ...], np.ndarray, str]:
    """Return class names, int32 [n] indices into them (-1 without a label), and a note for the description."""
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


def _progress(results: Iterable[tuple[int, Scanned]], total: int, show: bool | None) -> Iterator[tuple[int, Scanned]]:
    from tqdm import tqdm

    with tqdm(total=total, unit=" images", unit_scale=True, disable=None if show is None else not show) as bar:
        for start, (entries, faults) in results:
            bar.update(len(entries))
            yield start, (entries, faults)
