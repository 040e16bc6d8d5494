"""What tests of the index share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from cjepa_fast import index
from cjepa_fast.manifest import Manifest
from cjepa_fast.sources import Rejected, find_source


def build(root: object, mode: index.Mode = "thorough", **options: int) -> tuple[Manifest, list[Rejected]]:
    with ThreadPoolExecutor(2) as pool:
        return index.build(find_source(str(root)), mode=mode, pool=pool, **options)
