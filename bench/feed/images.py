"""The JPEGs that readers are timed on: taken from a source or made, and laid out as files, tar shards and parquet."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import tarfile
from pathlib import Path

import numpy as np

from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import FORMATS
from cjepa_fast.feed.index import open_sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """JPEGs below `folder`, in the layout of every reader."""

    name: str  # "imagenet", or "synthetic 500x375"
    size: int  # side of a training view in pixels
    batch_size: int
    count: int
    folder: Path

    @property
    def files(self) -> Path:
        """The folder of files, with one class folder."""
        return self.folder / "files"

    @property
    def shards(self) -> list[str]:
        return sorted(map(str, (self.folder / "shards").glob("*.tar")))

    @property
    def parquet(self) -> Path:
        return self.folder / "images.parquet"


def lay_out(
    encoded: list[bytes], folder: Path, *, name: str, size: int, batch_size: int, shards: int
) -> Images:  # fmt: skip
    """Write the same JPEGs as files, as tar shards and, where pyarrow is installed, as parquet."""
    (folder / "files" / "all").mkdir(parents=True)
    (folder / "shards").mkdir()
    for i, data in enumerate(encoded):
        (folder / "files" / "all" / f"{i:06d}.jpg").write_bytes(data)
    for k in range(shards):
        with tarfile.open(folder / "shards" / f"{k:03d}.tar", "w") as shard:
            for i in range(k, len(encoded), shards):
                member = tarfile.TarInfo(f"{i:06d}.jpg")
                member.size = len(encoded[i])
                shard.addfile(member, io.BytesIO(encoded[i]))
    images = Images(name=name, size=size, batch_size=batch_size, count=len(encoded), folder=folder)
    if importlib.util.find_spec("pyarrow"):
        pyarrow, parquet = (importlib.import_module(m) for m in ("pyarrow", "pyarrow.parquet"))
        column = [{"bytes": data, "path": None} for data in encoded]
        parquet.write_table(pyarrow.table({"image": column}), images.parquet, row_group_size=100)
    return images


def read_jpegs(root: str, limit: int) -> list[bytes]:
    """Read up to `limit` JPEGs, spread evenly over the source `root`; shuffled, as shards must be."""
    source = open_sources([root])
    formats = np.concatenate([manifest.entries["format"] for manifest in source.manifests])
    jpegs = np.flatnonzero(formats == FORMATS.index("JPEG"))
    if not len(jpegs):
        raise UserError(f"{root}: holds no JPEG, and only JPEGs are timed")
    chosen = jpegs[np.linspace(0, len(jpegs) - 1, min(limit, len(jpegs))).astype(int)]
    return [source.read(int(i)) for i in np.random.default_rng(0).permutation(chosen)]


def synthetic_jpegs(height: int, width: int, count: int) -> list[bytes]:
    """Make coloured shapes under grain with Pillow; about 110 kB at 375 x 500, the mean of ImageNet."""
    from PIL import Image

    rng, encoded = np.random.default_rng(0), []
    for _ in range(count):
        coarse = rng.integers(0, 256, (4, 5, 3)) + np.array([30, 0, -30]) + np.linspace(40, -40, 4)[:, None, None]
        picture = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 25, (height, width, 1))
        pixels = (np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        encoded.append(file.getvalue())
    return encoded
