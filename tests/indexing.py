"""Helpers of the tests of the index."""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor

from bad_images import SOUND
from cjepa_fast.feed import index
from cjepa_fast.feed.listing import Rejected
from cjepa_fast.feed.manifest import Manifest
from cjepa_fast.feed.scan import Mode
from cjepa_fast.feed.sources import find_source


def build(root: object, mode: Mode = "thorough", **options: int) -> tuple[Manifest, list[Rejected]]:
    with ThreadPoolExecutor(2) as pool:
        return index.build(find_source(str(root)), mode=mode, pool=pool, **options)


def tar(*members: tuple[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar archive of (name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


PAIR = (("a.jpg", SOUND), ("b.jpg", SOUND))
