"""Find a library of `csrc`, or build it once for each user, and load it.

A library has a plain C interface for ctypes, so one build serves every version of Python and torch. Each library holds
the hash of its sources and options; a library with another hash is never used.

setup.py runs this file by path, without the package: import the standard library alone at this level.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
FLAGS = ("-O3", "-std=c++17")
HOST_FLAGS = (*FLAGS, "-fPIC", "-pthread")  # no -march=native: machines of several kinds may share the cache
_TIMEOUT_S = 300

Functions = Mapping[str, tuple[Any, ...]]  # name: ctypes type of the result, then those of the arguments


class Unavailable(Exception):
    """A library that cannot be built or loaded; the message is the reason in one line."""


class Library:
    """A library that `load` returns at its first use; `load` raises Unavailable if there is none."""

    def __init__(self, load: Callable[[], ctypes.CDLL]) -> None:
        @functools.cache
        def found() -> ctypes.CDLL | str:
            try:
                return load()
            except Unavailable as reason:
                return str(reason)

        self.found = found

    def why_unavailable(self) -> str | None:
        """Return None if the library is loaded, which may build the library first, else the reason in one line."""
        found = self.found()
        return found if isinstance(found, str) else None

    def __call__(self) -> ctypes.CDLL:
        """Return the library, which must be available."""
        found = self.found()
        assert not isinstance(found, str), found
        return found


def sources(suffix: str) -> list[Path]:
    """Return the files `csrc/*.suffix`, sorted."""
    return sorted((PACKAGE / "csrc").glob(f"*.{suffix}"))


def source_hash(suffix: str, options: Sequence[str], version: str = "") -> str:
    """Return 16 hex digits that depend on the sources, all headers, the options and the compiler's version."""
    digest = hashlib.sha256(" ".join((*options, version)).encode())
    for path in (*sources(suffix), *sources("h")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(command: Sequence[str]) -> str:
    """Return what a command prints. Raises Unavailable with the first line of its error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error
    if done.returncode != 0:
        error = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[0]
        raise Unavailable(f"{command[0]} failed: {error}")
    return done.stdout


def open_library(path: Path, functions: Functions, expected_hash: str) -> ctypes.CDLL | None:
    """Return the library at `path` with its functions typed, or None if it is missing, broken or of another hash."""
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in {"cjepa_source_hash": (ctypes.c_char_p,), **functions}.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        if library.cjepa_source_hash().decode() == expected_hash:
            return library
        log.info("%s was built from other sources: ignored", path)
    except (OSError, AttributeError) as error:
        log.info("%s cannot be loaded (%s): ignored", path, error)
    return None


def load(
    name: str,
    suffix: str,
    options: Sequence[str],
    compiler: Callable[[], list[str]],
    functions: Functions,
    version: str = "",
) -> ctypes.CDLL:
    """Return the library of `csrc/*.suffix` from beside the package or the user's cache, else compile it there.

    One process compiles while others wait. A complete file is renamed into place, so no process loads half of one.

    Args:
        name: start of the file's name in the cache; beside the package an underscore precedes the name.
        compiler: returns the compiler's command, or raises Unavailable; called only to compile.
        version: the compiler's version, if libraries of different versions must not be mixed.

    Raises:
        Unavailable: no library could be had.
    """
    from cjepa_fast.cache import cache_directory

    source = source_hash(suffix, options, version)
    path = cache_directory() / f"{name}-{source}-{sys.platform}-{platform.machine()}.so"
    for found in (*sorted(PACKAGE.glob(f"_{name}*.so")), path):
        if library := open_library(found, functions, source):
            return library
    files = [str(file) for file in sources(suffix)]
    if not files:
        raise Unavailable(f"{PACKAGE / 'csrc'} holds no .{suffix} files")
    command = compiler()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if library := open_library(path, functions, source):  # another process built it meanwhile
                return library
            partial = path.with_suffix(".partial")
            define = f'-DCJEPA_SOURCE_HASH="{source}"'
            run([*command, *options, "-shared", define, *files, "-o", str(partial)])
            os.replace(partial, path)
    except OSError as error:
        raise Unavailable(f"the library could not be built in {path.parent}: {error}") from error
    log.info("compiled csrc/*.%s with %s: %s", suffix, command[0], path)
    if library := open_library(path, functions, source):
        return library
    raise Unavailable(f"{path} was built but cannot be loaded")
