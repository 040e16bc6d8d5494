"""Sources: the kind and the files of a root, found without opening an image, shard or list.

A root is a folder of images (with or without class folders), tar shards (a folder of them, a pattern or one file),
parquet files of encoded images, or a list of paths. Its kind follows from the files found; `KIND:` in front overrides.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
import stat
from dataclasses import dataclass

from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import SUFFIXES

KINDS = ("folder", "tar", "parquet", "list")
SPLITS = ("train", "val", "valid", "validation", "test")
_LISTS = (".txt", ".csv", ".tsv")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_NOUN = {"folder": "images", "tar": ".tar files", "parquet": ".parquet files"}


def parse_root(text: str) -> tuple[str, float]:
    """Split `PATH` or `PATH=WEIGHT` into path and weight (1 if absent); a path that exists as written has no weight.

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


@dataclass(frozen=True, kw_only=True)
class Source:
    """A root and its files."""

    root: str  # as the user wrote it
    kind: str  # one of KINDS
    base: str  # absolute folder that `files` are relative to
    files: list[str]  # images of a folder, shards, or the one list; in code point order
    ignored: int = 0  # files that are none of these
    stamps: dict[str, tuple[int, int]]  # absolute path to `stamp`; while all stay, so do `files`
    pattern: str = ""  # absolute, if the root is one


def count(n: int, noun: str) -> str:
    """Return a number with its noun, such as "1,000 images"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def printable(path: str) -> str:
    """Return `path` for a message of one line, with escapes for bytes that cannot be printed."""
    return path if path.isprintable() else ascii(path)[1:-1]


def stamp(path: str) -> tuple[int, int]:
    """Return (mtime in ns, bytes) of a file, or (mtime in ns, 0) of a folder, whose size means nothing."""
    status = os.stat(path)
    return status.st_mtime_ns, 0 if stat.S_ISDIR(status.st_mode) else status.st_size


def find_source(root: str) -> Source:
    """Find out the kind of `root`, a folder of images, tar shards, parquet files or a list, and its files.

    Raises:
        UserError: nothing is there, nothing usable, or more than one kind.
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
    kind = kind or ("list" if name.endswith(_LISTS) else _shard_kind(name))
    if kind in (None, "folder"):
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


def _one_split(root: str, shards: list[str]) -> None:
    """Raise UserError if the names of shards tell of several splits."""
    words = {word for shard in shards for word in re.split(r"[^a-z]+", shard.lower()) if word in SPLITS}
    if len(words) > 1:
        raise UserError(
            f"{printable(root)}: holds shards of {' and '.join(sorted(words))}; name one, as in "
            f"{os.path.join(printable(root), min(words) + '-*' + os.path.splitext(shards[0])[1])}"
        )


def _walk(base: str) -> tuple[dict[str, list[str]], int, dict[str, tuple[int, int]]]:
    """Return relative paths under `base` by kind, the number of other files, and the stamps of all folders."""
    files: dict[str, list[str]] = {"folder": [], "tar": [], "parquet": []}
    stamps: dict[str, tuple[int, int]] = {}
    ignored = 0
    folders = [""]
    seen: set[tuple[int, int]] = set()  # a link to a parent folder would repeat its images without end
    while folders:
        folder = folders.pop()
        absolute = os.path.normpath(os.path.join(base, folder))
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
    except OSError:  # a link to itself: reading reports it
        return False


def expand_pattern(pattern: str) -> list[str]:
    """Return the absolute paths that a pattern of `{000..127}`, `{a,b}`, `*`, `?` and `[...]` stands for, sorted.

    Numbers keep the width of the first one. Files named by braces must exist; wildcards may match nothing.

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
