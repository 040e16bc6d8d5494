"""Listings: the images of a source before any of them is read. `feed.shards` lists shards."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import SUFFIXES
from cjepa_fast.feed.sources import Source, count, printable

# Column names in the header of a CSV or in a parquet file
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "cls", "target", "category", "fine_label")


class Rejected(NamedTuple):
    """A sample, or a whole shard, that is left out."""

    file: str
    member: str  # of a shard, else empty
    reason: str  # one of images.REASONS
    detail: str


@dataclass(kw_only=True)
class Listing:
    """The images of a source; the lists in singular have one entry per image."""

    containers: list[str] = field(default_factory=list)  # folders or shards, relative to the source's base
    container: list[int] = field(default_factory=list)  # index into containers
    name: list[str] = field(default_factory=list)  # in the container
    offset: list[int] = field(default_factory=list)  # bytes in a tar, row in a parquet file, 0 in a folder
    size: list[int] = field(default_factory=list)  # bytes in a tar, -1 where not known yet
    label: list[int | str | None] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    ignored: int = 0  # files or members that are neither images nor labels
    classes: tuple[str, ...] | None = None  # names behind integer labels, where the source has them
    where: str = ""  # for a message: "1,000 class folders"

    def add(
        self, container: int, name: str, *, offset: int = 0, size: int = -1, label: int | str | None = None
    ) -> None:
        """Append one image."""
        self.container.append(container)
        self.name.append(name)
        self.offset.append(offset)
        self.size.append(size)
        self.label.append(label)

    def reject(self, file: str, member: str, reason: str, detail: str) -> None:
        """Append one sample or shard that is left out."""
        self.rejected.append(Rejected(file, member, reason, detail))

    def extend(self, other: Listing) -> None:
        """Append the images of another listing."""
        shift = len(self.containers)
        self.container += [shift + c for c in other.container]
        for column in ("containers", "name", "offset", "size", "label", "rejected"):
            getattr(self, column).extend(getattr(other, column))
        self.ignored += other.ignored
        self.classes = self.classes or other.classes


def list_folder(source: Source) -> Listing:
    """List a folder. Images have labels if each lies directly in one of at least two folders of the root."""
    parents, names = zip(*(os.path.split(path) for path in source.files), strict=True)
    folders = sorted(set(parents))
    labelled = len(folders) > 1 and all(name and "/" not in name for name in folders)
    index = {name: i for i, name in enumerate(folders)}
    places = [index[parent] for parent in parents]
    n = len(places)
    return Listing(
        containers=folders,
        container=places,
        name=list(names),
        offset=[0] * n,
        size=[-1] * n,
        label=list(places) if labelled else [None] * n,
        ignored=source.ignored,
        classes=tuple(folders) if labelled else None,
        where=f"{len(folders):,} class folders" if labelled else count(len(folders), "folder"),
    )


def list_paths(source: Source) -> Listing:
    """List the images that a .txt, .csv or .tsv file names, in its order; relative paths are relative to it.

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
            rows = _csv_rows(text, file) if file.lower().endswith((".csv", ".tsv")) else _text_rows(text)
            for line, name, label in rows:
                lines += 1
                if "\0" in name:
                    raise UserError(
                        f"{shown}:{line}: holds a zero byte, so it is not a text file; give a list of paths"
                    )
                folder, base = os.path.split(name)
                key = os.path.normpath(name)
                if not base:
                    listing.reject(path, f"line {line}", "missing", f"{name!r} names no file")
                elif key in seen:
                    listing.reject(path, f"line {line}", "duplicate", f"{printable(name)} is listed before")
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
    """Yield (line number, path, label). A label stands behind a tab, or is a number behind an image's name."""
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
    """Yield (line number, path, label) by the header, or from the first two columns."""
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
