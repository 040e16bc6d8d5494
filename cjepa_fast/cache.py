"""The user's cache folder, and files and folders that appear complete or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cjepa_fast.errors import UserError


def cache_directory() -> Path:
    """Return $CJEPA_CACHE, else $XDG_CACHE_HOME/cjepa_fast, else ~/.cache/cjepa_fast; it is not created."""
    if own := os.environ.get("CJEPA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cjepa_fast"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file of the cache, which is created; other processes wait.

    Raises:
        UserError: the cache cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise _unwritable(path.parent, error) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached_folder(name: str, write: Callable[[Path], None]) -> Path:
    """Return the cache's folder `name`; if absent, one process fills it by `write(folder)` while others wait.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = cache_directory() / name
    if folder.is_dir():
        return folder
    with locked(folder.with_name(f"{name}.lock")):
        if not folder.is_dir():
            partial = folder.with_name(f"{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                write(partial)
                os.replace(partial, folder)
            except OSError as error:
                raise _unwritable(folder, error) from None
    return folder


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: the cache cannot be written ({error.strerror}); point CJEPA_CACHE to another folder")


def write_atomically(path: Path, pieces: Sequence[bytes]) -> None:
    """Write a file; after an error the old one is unchanged.

    Raises:
        UserError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another place or free space") from None
