"""The user's cache folder, and folders in it that are written once."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from cjepa_fast.errors import UserError


def cache_directory() -> Path:
    """$CJEPA_CACHE, else $XDG_CACHE_HOME/cjepa_fast, else ~/.cache/cjepa_fast; not created."""
    if own := os.environ.get("CJEPA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cjepa_fast"


def cached_folder(name: str, write: Callable[[Path], None]) -> Path:
    """The cache's folder `name`; if it is not there, `write(folder)` fills it, in one process while others wait.

    The folder appears complete or not at all. Raises UserError if the cache cannot be written.
    """
    folder = cache_directory() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f"{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                partial = folder.with_name(f"{name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                write(partial)
                os.replace(partial, folder)
    except OSError as error:
        raise UserError(
            f"{folder}: the cache cannot be written ({error.strerror}); point CJEPA_CACHE to another folder"
        ) from None
    return folder
