"""Where images lie: what a root holds, and the list of its images, without reading an image.

A root is a folder of images (with or without class folders), tar shards (a folder of them, a pattern or one file),
parquet files of encoded images, or a list of paths. What it is follows from what is there; `KIND:` in front decides.
What lies in a shard is listed by `cjepa_fast.feed.shards`.
"""

from __future__ import annotations

import csv
import glob
import itertools
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import SUFFIXES
from cjepa_fast.philox import philox4x32

KINDS = ("folder", "tar", "parquet", "list")
SPLITS = ("train", "val", "valid", "validation", "test")
_LISTS = (".txt", ".csv", ".tsv")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_VISITS = int.from_bytes(b"visi", "little")  # the counter word that keeps these draws apart from all others


# --- several roots with weights


def parse_root(text: str) -> tuple[str, float]:
    """`PATH` or `PATH=WEIGHT` as (path, weight); a path that exists as written is no weight.

    Raises:
        UserError: the weight is not a positive number.
    """
    path, equals, weight = text.rpartition("=")
    if not equals or os.path.lexists(text):
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{text}: {weight!r} is not a weight; write PATH=2 or PATH=0.5, above 0")
    return path, value


def epoch_visits(
    counts: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """What an epoch over several sources visits, in the order of the ids; shuffling it is the caller's.

    A source of n samples and weight w gets m = round(w * n) visits: every sample m // n times, and the m % n left over
    walk from epoch to epoch through one permutation after another, so that over the epochs every sample is visited
    equally often to within one. (Where a permutation ends inside an epoch, a sample may get two of those left over.)
    A pure function of its arguments; with all weights 1 it is every id once.

    Returns:
        int64 ids [m], ascending, the first source's samples before the second's; and int64 repeats [m]: 0 for the
        first visit of an id in this epoch, 1 for the second, so that its crops can differ.
    """
    found = []
    for source, (n, weight) in enumerate(zip(counts, weights, strict=True)):
        whole, rest = divmod(round(weight * n), n)
        visits = np.full(n, whole, dtype=np.int64)
        at, end = epoch * rest, (epoch + 1) * rest
        while at < end:
            turn, start = divmod(at, n)
            stop = min(n, start + end - at)
            visits[_permutation(n, seed=seed, source=source, turn=turn)[start:stop]] += 1
            at += stop - start
        found.append(visits)
    visits = np.concatenate(found)
    ids = np.repeat(np.arange(len(visits)), visits)
    return ids, np.arange(len(ids)) - np.repeat(np.cumsum(visits) - visits, visits)


def _permutation(n: int, *, seed: int, source: int, turn: int) -> np.ndarray:
    counter = np.empty((n, 4), dtype=np.uint32)
    counter[:, 0] = np.arange(n)
    counter[:, 1:] = source, turn, _VISITS
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.uint64)
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")


# --- what a root is


@dataclass(frozen=True, kw_only=True)
class Source:
    """A root and the files that make it up; no image, shard or list has been opened."""

    root: str  # as the user wrote it
    kind: str  # one of KINDS
    base: str  # absolute folder that `files` are relative to
    files: list[str]  # images of a folder, shards, or the one list; in code point order
    ignored: int = 0  # files that are none of these
    stamps: dict[str, tuple[int, int]]  # absolute path to (mtime in ns, bytes): if none changed, nor did `files`
    pattern: str = ""  # absolute, if the root is one


class Rejected(NamedTuple):
    """A sample, or a whole shard, that is left out."""

    file: str
    member: str  # of a shard, else empty
    reason: str  # one of images.REASONS
    detail: str


@dataclass(kw_only=True)
class Listing:
    """The images of a source before any is read. The lists have one entry per image."""

    containers: list[str] = field(default_factory=list)  # folders or shards, relative to the source's base
    container: list[int] = field(default_factory=list)  # an index into it
    name: list[str] = field(default_factory=list)  # in the container
    offset: list[int] = field(default_factory=list)  # bytes in a tar, row in a parquet file, 0 in a folder
    size: list[int] = field(default_factory=list)  # bytes in a tar, -1 where it is not known yet
    label: list[int | str | None] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    ignored: int = 0  # other files, or members that are neither images nor labels
    classes: tuple[str, ...] | None = None  # the names behind integer labels, where the source knows them
    where: str = ""  # for people: "1,000 class folders"

    def add(
        self, container: int, name: str, *, offset: int = 0, size: int = -1, label: int | str | None = None
    ) -> None:
        self.container.append(container)
        self.name.append(name)
        self.offset.append(offset)
        self.size.append(size)
        self.label.append(label)

    def extend(self, other: Listing) -> None:
        shift = len(self.containers)
        self.containers += other.containers
        self.container += [shift + c for c in other.container]
        for mine, theirs in ((self.name, other.name), (self.offset, other.offset), (self.size, other.size)):
            mine.extend(theirs)  # pyright: ignore[reportArgumentType]
        self.label += other.label
        self.rejected += other.rejected
        self.ignored += other.ignored
        self.classes = self.classes or other.classes


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def printable(path: str) -> str:
    """`path` for a message of one line, whatever bytes it holds."""
    return path if path.isprintable() else ascii(path)[1:-1]


def stamp(path: str) -> tuple[int, int]:
    """(mtime in ns, bytes) of a file; of a folder with 0 bytes, as what a folder counts as its size is nobody's."""
    status = os.stat(path)
    return status.st_mtime_ns, 0 if stat.S_ISDIR(status.st_mode) else status.st_size


def find_source(root: str) -> Source:
    """What `root` is: a folder of images, tar shards, parquet files or a list.

    Raises:
        UserError: nothing there, nothing usable, or more than one thing.
    """
    kind, path = None, root
    if match := re.match(rf"({'|'.join(KINDS)}):(.+)", root, re.DOTALL):
        kind, path = match.groups()
    shown = printable(root)
    if "://" in path:
        raise UserError(f"{shown}: only local paths are read; copy or mount it")
    if "\0" in path:
        raise UserError(f"{shown}: a path holds no zero byte; correct it")
    if not os.path.lexists(path) and re.search(r"[*?\[{]", path):
        return _shards(root, path, kind)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return _folder(root, path, kind)
    except FileNotFoundError:
        raise UserError(f"{shown}: no such file or folder; give the folder that holds the images") from None
    except OSError as error:
        where = printable(str(error.filename))
        raise UserError(f"{where}: cannot be listed ({error.strerror}); grant read access") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{shown}: is neither a file nor a folder; give the folder that holds the images")
    name = path.lower()
    if kind in (None, "list") and (kind or name.endswith(_LISTS)):
        kind = "list"
    elif kind in (None, "tar", "parquet"):
        kind = kind or _shard_kind(path)
    if kind is None or kind == "folder":
        what = "a single image" if name.endswith(SUFFIXES) else "packed" if name.endswith(_PACKED) else "a file"
        remedy = "unpack it once" if what == "packed" else "give a folder, .tar, .parquet, .txt or .csv"
        raise UserError(f"{shown}: is {what}; {remedy}")
    absolute = os.path.abspath(path)
    base, file = os.path.split(absolute)
    return Source(root=root, kind=kind, base=base, files=[file], stamps={absolute: stamp(absolute)})


def _shard_kind(path: str) -> str | None:
    name = path.lower()
    return "tar" if name.endswith(".tar") else "parquet" if name.endswith(".parquet") else None


def _folder(root: str, path: str, kind: str | None) -> Source:
    base = os.path.abspath(path)
    files, ignored, stamps = _walk(base)
    found = {k: sorted(f) for k, f in files.items() if f}
    if kind is None:
        if len(found) > 1:
            things = " and ".join(f"{len(f):,} {_NOUN[k]}" for k, f in found.items())
            raise UserError(
                f"{printable(root)}: holds {things}; say which, as in {next(iter(found))}:{printable(root)}"
            )
        kind = next(iter(found), "folder")
    if kind == "list":
        raise UserError(f"{printable(root)}: is a folder, not a list; leave out 'list:' or give the file")
    if not found.get(kind):
        others = count(ignored + sum(map(len, found.values())), "other file")
        endings = "a folder with " + " ".join(SUFFIXES) + " files" if kind == "folder" else f"one with .{kind} files"
        raise UserError(f"{printable(root)}: holds no {_NOUN[kind]} but {others}; give {endings}")
    ignored += sum(len(f) for k, f in found.items() if k != kind)
    if kind != "folder":
        _one_split(root, found[kind])
        stamps |= {os.path.join(base, f): stamp(os.path.join(base, f)) for f in found[kind]}
    return Source(root=root, kind=kind, base=base, files=found[kind], ignored=ignored, stamps=stamps)


_NOUN = {"folder": "images", "tar": ".tar files", "parquet": ".parquet files"}


def _one_split(root: str, shards: list[str]) -> None:
    words = {word for shard in shards for word in re.split(r"[^a-z]+", shard.lower()) if word in SPLITS}
    if len(words) > 1:
        raise UserError(
            f"{printable(root)}: holds shards of {' and '.join(sorted(words))}; name one, as in "
            f"{os.path.join(printable(root), min(words) + '-*' + os.path.splitext(shards[0])[1])}"
        )


def _walk(base: str) -> tuple[dict[str, list[str]], int, dict[str, tuple[int, int]]]:
    """Relative paths of images, tars and parquet files under `base`; the number of other files; folders' stamps."""
    files: dict[str, list[str]] = {"folder": [], "tar": [], "parquet": []}
    stamps: dict[str, tuple[int, int]] = {}
    ignored = 0
    folders = [""]
    seen: set[tuple[int, int]] = set()  # else a link to a parent folder would repeat its images without end
    while folders:
        folder = folders.pop()
        absolute = os.path.join(base, folder) if folder else base
        status = os.stat(absolute)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        stamps[absolute] = status.st_mtime_ns, 0
        with os.scandir(absolute) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".")
                if _is_folder(entry):
                    if not hidden:
                        folders.append(f"{folder}{entry.name}/")
                    continue
                kind = "folder" if entry.name.lower().endswith(SUFFIXES) else _shard_kind(entry.name)
                if kind is None or hidden:
                    ignored += 1
                else:
                    files[kind].append(folder + entry.name)
    return files, ignored, stamps


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; reading it will say so
        return False


def expand_pattern(pattern: str) -> list[str]:
    """The absolute paths that a pattern of `{000..127}`, `{a,b}`, `*`, `?` and `[...]` stands for, sorted.

    Numbers keep the width of the first one. What braces name must exist; what wildcards match may be nothing.

    Raises:
        UserError: a file that braces name is missing.
    """
    named = [""]
    for literal, choice in re.findall(r"([^{]+)|\{([^{}]*)\}", pattern):
        if span := re.fullmatch(r"(\d+)\.\.(\d+)", choice):
            low, high = map(int, span.groups())
            if abs(high - low) >= 10**6:
                raise UserError(f"{printable(pattern)}: stands for more than a million files; shorten it")
            options = [f"{i:0{len(span[1])}d}" for i in range(min(low, high), max(low, high) + 1)]
        else:
            options = [literal] if literal else choice.split(",")
        named = [prefix + option for prefix in named for option in options]
    wild = bool(re.search(r"[*?\[]", pattern))
    missing = [] if wild else [name for name in named if not os.path.exists(name)]
    if missing:
        raise UserError(
            f"{printable(missing[0])}: no such file; {len(missing):,} of the {len(named):,} files that "
            f"{printable(pattern)} stands for are missing"
        )
    found = itertools.chain.from_iterable(map(glob.glob, named)) if wild else named
    return sorted({os.path.abspath(name) for name in found})


def _shards(root: str, pattern: str, kind: str | None) -> Source:
    shards = expand_pattern(pattern)
    kinds = {kind or _shard_kind(shard) for shard in shards}
    if not shards:
        raise UserError(f"{printable(root)}: no file matches; check the pattern")
    if kinds not in ({"tar"}, {"parquet"}):
        raise UserError(f"{printable(root)}: a pattern stands for .tar files or for .parquet files; narrow it")
    base = os.path.commonpath([os.path.dirname(shard) for shard in shards])
    return Source(
        root=root,
        kind=kinds.pop() or "",
        base=base,
        files=[os.path.relpath(shard, base) for shard in shards],
        stamps={shard: stamp(shard) for shard in shards},
        pattern=os.path.abspath(pattern),
    )


# --- the images of a source


def list_folder(source: Source) -> Listing:
    """The images of a folder. Class labels if every image lies directly in one of at least two folders of the root."""
    parents = [path.rpartition("/")[0] for path in source.files]
    folders = sorted(set(parents))
    labelled = len(folders) > 1 and all(name and "/" not in name for name in folders)
    index = {name: i for i, name in enumerate(folders)}
    places = [index[parent] for parent in parents]
    n = len(places)
    return Listing(
        containers=folders,
        container=places,
        name=[path.rpartition("/")[2] for path in source.files],
        offset=[0] * n,
        size=[-1] * n,
        label=list(places) if labelled else [None] * n,
        ignored=source.ignored,
        classes=tuple(folders) if labelled else None,
        where=f"{len(folders):,} class folders" if labelled else count(len(folders), "folder"),
    )


# Names of columns, and of the header of a CSV.
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "cls", "target", "category", "fine_label")


def list_paths(source: Source) -> Listing:
    """The images that a .txt, .csv or .tsv file names, in its order; relative paths are relative to it.

    Raises:
        UserError: the list cannot be read, is not text or names nothing.
    """
    file = source.files[0]
    path = os.path.join(source.base, file)
    shown = printable(path)
    listing = Listing()
    folders: dict[str, int] = {}
    seen: set[str] = set()
    lines = 0
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            rows = _text_rows(text) if not file.lower().endswith((".csv", ".tsv")) else _csv_rows(text, file)
            for line, name, label in rows:
                lines += 1
                if "\0" in name:
                    raise UserError(
                        f"{shown}:{line}: holds a zero byte, so it is not a text file; give a list of paths"
                    )
                folder, base = os.path.split(name)
                key = os.path.normpath(name)
                if not base:
                    listing.rejected.append(Rejected(path, f"line {line}", "missing", f"{name!r} names no file"))
                elif key in seen:
                    detail = f"{printable(name)} is listed before"
                    listing.rejected.append(Rejected(path, f"line {line}", "duplicate", detail))
                else:
                    seen.add(key)
                    listing.add(folders.setdefault(folder, len(folders)), base, label=label)
    except csv.Error as error:
        raise UserError(f"{shown}: is not a CSV file ({error}); give a list of paths") from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}); grant read access") from None
    if not lines:
        raise UserError(f"{shown}: names no image; write one path per line")
    listing.containers = list(folders)
    listing.where = f"a list of {count(lines, 'path')}"
    return listing


def _text_rows(text: Iterable[str]) -> Iterator[tuple[int, str, str | None]]:
    """(line number, path, label): a path per line, a label behind a tab or, if a number, behind an image's name."""
    numbered = re.compile(rf"(.*(?:{'|'.join(map(re.escape, SUFFIXES))})) +(-?\d+)", re.IGNORECASE)
    for i, line in enumerate(text, 1):
        line = line.strip("\r\n")
        if not line.strip() or line.startswith("#"):
            continue
        path, tab, label = line.rpartition("\t")
        if tab:
            yield i, path, label.strip() or None
        elif match := numbered.fullmatch(line.rstrip()):
            yield i, match[1], match[2]
        else:
            yield i, line, None


def _csv_rows(text: Iterable[str], file: str) -> Iterator[tuple[int, str, str | None]]:
    reader = csv.reader(text, delimiter="\t" if file.lower().endswith(".tsv") else ",", strict=True)
    path_at, label_at, first = 0, 1, True
    for row in reader:
        if not "".join(row).strip() or row[0].startswith("#"):
            continue
        header = [cell.strip().lower() for cell in row]
        if first and set(header) & set(_PATH_COLUMNS):
            path_at = next(i for i, cell in enumerate(header) if cell in _PATH_COLUMNS)
            label_at = next((i for i, cell in enumerate(header) if cell in LABEL_COLUMNS), len(header))
        else:
            label = row[label_at].strip() if label_at < len(row) else ""
            yield reader.line_num, row[path_at] if path_at < len(row) else "", label or None
        first = False
