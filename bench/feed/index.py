"""The rate of indexing images, and the cost of opening a large manifest."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench.feed.images import Images
from bench.records import Row
from cjepa_fast.feed.images import MAX_PIXELS
from cjepa_fast.feed.manifest import ENTRY, Manifest, Strings
from cjepa_fast.feed.scan import inspect_files


def index_rates(images: Images, entries: int, repeats: int = 3) -> Row:
    """Measure thorough indexing of the files in one thread, and the opening of a manifest of made-up entries.

    The rate is images over processor seconds, the best of `repeats`.
    """
    paths = sorted((images.files / "all").iterdir())
    task = (str(images.files), ["all"] * len(paths), [path.name for path in paths])
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        _, faults = inspect_files(task, mode="thorough", max_pixels=MAX_PIXELS)
        taken.append(time.process_time() - start)
        if faults:
            raise ValueError(f"{len(faults)} sound images were left out")
    path = images.folder / "manifest"
    made_up_manifest(entries).save(path)
    seconds, mib = opening(path)
    return {"indexed_per_cpu_s": len(paths) / min(taken), "indexed_images": len(paths), "entries": entries,
            "load_s": seconds, "load_mib": mib, "file_mib": path.stat().st_size / 2**20}  # fmt: skip


def opening(path: Path) -> tuple[float, float]:
    """Measure processor seconds and MiB to open a manifest and read its columns and a path, in a new process."""
    code = f"""
import time
from pathlib import Path
from cjepa_fast.feed.manifest import Manifest
def most_resident():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before, start = most_resident(), time.process_time()
manifest = Manifest.load(Path({str(path)!r}))
manifest.sizes, manifest.labels, manifest.path(len(manifest) - 1)
print(time.process_time() - start, (most_resident() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, mib = map(float, done.stdout.split())
    return seconds, mib


def made_up_manifest(n: int) -> Manifest:
    """Make a manifest of n entries in a thousand classes, named like ImageNet's images."""
    entries = np.zeros(n, dtype=ENTRY)
    entries["bytes"], entries["container"] = np.arange(n), np.arange(n) % 1000
    entries["label"] = entries["container"]
    classes = [f"n{i:08d}" for i in range(1000)]
    meta = {"root": "/r", "kind": "folder", "base": "/r", "mode": "quick", "max_pixels": MAX_PIXELS, "classes": classes,
            "description": "", "left_out": {}, "pattern": ""}  # fmt: skip
    names = Strings.pack([f"n01440764_{i}.JPEG" for i in range(n)])
    return Manifest(meta, entries, names, Strings.pack(classes), Strings.pack([]), np.zeros((0, 2), "<i8"))
