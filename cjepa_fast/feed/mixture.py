"""One or several manifests as one data set, with weights."""

from __future__ import annotations

import bisect
import itertools
import zlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from cjepa_fast.feed.manifest import Manifest, SampleError


class Mixture:
    """The images of several manifests, whose ids run through them in order.

    Attributes:
        sizes: int32 [n, 2], height and width in pixels after the EXIF orientation.
        classes, labels: names, and int64 [n] indices into them; labels is None unless all manifests name the same
            classes.
    """

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
        self.description = manifests[0].description if len(manifests) == 1 else "; ".join(shares)
        self.description += "" if same else "; labels not used as the sources name different classes"

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def visits(self) -> int:
        """The number of images that an epoch visits; len(self) if all weights are 1."""
        return sum(round(weight * len(m)) for m, weight in zip(self.manifests, self.weights, strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the weights, and of the names and sizes of all images in order; not of where they lie."""
        crc = zlib.crc32(repr(self.weights).encode())
        for manifest in self.manifests:
            sizes = (manifest.entries[c] for c in ("bytes", "height", "width"))
            for column in (manifest.names.blob, manifest.names.ends, *sizes):
                crc = zlib.crc32(column.tobytes(), crc)
        return f"{crc:08x}"

    def read(self, i: int) -> bytes:
        """Read image i as `Manifest.read` does; a SampleError carries the id in the mixture."""
        (data,) = self.read_many(np.array([i]))
        if isinstance(data, SampleError):
            raise data
        return data

    def read_many(self, ids: np.ndarray) -> list[bytes | SampleError]:
        """Read images as `Manifest.read_many` does; errors carry the ids in the mixture."""
        of = self.source_of(ids)
        found: list[bytes | SampleError] = [b""] * len(ids)
        for k in np.unique(of):
            places = np.flatnonzero(of == k)
            start = self.starts[k]
            for place, data in zip(places.tolist(), self.manifests[k].read_many(ids[places] - start), strict=True):
                found[place] = data if isinstance(data, bytes) else SampleError(data.sample + start, str(data))
        return found

    def source_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the position of each id's manifest, int64."""
        return np.searchsorted(self.starts, ids, side="right") - 1

    def path(self, i: int) -> str:
        """Return the file of image i: the image itself, or its shard."""
        manifest, at = self._locate(i)
        return manifest.path(at)

    def name(self, i: int) -> str:
        """Return the name of image i for a message."""
        manifest, at = self._locate(i)
        return manifest.name(at)

    def fault(self, i: int) -> str | None:
        """Return why image i cannot be used now, or None if it seems sound."""
        manifest, at = self._locate(i)
        return manifest.fault(at)

    def _locate(self, i: int) -> tuple[Manifest, int]:
        source = bisect.bisect_right(self.starts, i) - 1
        return self.manifests[source], i - self.starts[source]
