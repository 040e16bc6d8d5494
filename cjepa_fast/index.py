"""Index images once, so that training knows every one of them:  python -m cjepa_fast.index DATA [DATA ...]

Reads headers (quick) or every byte (thorough). Writes a manifest of the usable images to the cache, and beside it
bad_samples.jsonl: the images left out, and why. An unchanged source is not read again.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path

from cjepa_fast.cache import locked
from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import MAX_PIXELS
from cjepa_fast.feed.index import cached_manifest, current, summary, write_index
from cjepa_fast.feed.manifest import is_manifest
from cjepa_fast.feed.sources import find_source, parse_root, printable

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with arguments `argv`; return the exit code (0, 2 for bad input, 130 after an interrupt)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", module="PIL")  # the report says why an image is left out
    parser = argparse.ArgumentParser(
        prog="python -m cjepa_fast.index", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument(
        "roots", metavar="DATA", nargs="+", help="folder, shards, pattern or list; PATH=WEIGHT works too"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the manifest here instead of to the cache")
    parser.add_argument(
        "--mode", choices=["quick", "thorough"], default="thorough", help="headers, or every byte (default)"
    )
    parser.add_argument(
        "--processes", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes that read; all cores by default",
    )  # fmt: skip
    parser.add_argument(
        "--max-pixels", type=_positive, default=MAX_PIXELS, metavar="N", help="larger images are left out"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write bad_samples.jsonl here")
    parser.add_argument("--force", action="store_true", help="index again even if nothing changed")
    args = parser.parse_args(argv)
    try:
        if len(args.roots) > 1 and (args.out or args.report):
            raise UserError("--out and --report: take one DATA, got several; run once for each")
        for root in args.roots:
            _index(parse_root(root)[0], args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; an earlier index is unchanged", file=sys.stderr)
        return 130
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _index(root: str, args: argparse.Namespace) -> None:
    out = args.out or cached_manifest(root, mode=args.mode, max_pixels=args.max_pixels)
    report = args.report or out.with_name(f"{out.name}.bad_samples.jsonl" if args.out else "bad_samples.jsonl")
    if args.out and out.exists() and not is_manifest(str(out)):
        raise UserError(f"{out}: exists and is not a manifest; give --out another name")
    with nullcontext() if args.out else locked(out.with_name("lock")):
        start = time.perf_counter()  # not before the lock, for which another process may let this one wait
        old, why = current(out)
        asked = {"root": root, "mode": args.mode, "max_pixels": args.max_pixels}
        if old is not None and asked.items() <= old.meta.items() and report.exists() and not args.force:
            log.info("%s\nunchanged since it was indexed: %s", summary(old, report), out)
            return
        if why:
            log.info("indexing %s again: %s", printable(root), why)
        source = find_source(root)
        for path in (out, report):
            if os.path.abspath(path.parent) in source.stamps:
                raise UserError(f"{path}: lies in the folder that is indexed, and would change it; put it elsewhere")
        with workers(args.processes) as pool:
            try:
                manifest = write_index(source, out, report, mode=args.mode, max_pixels=args.max_pixels, pool=pool)
            except BrokenProcessPool:
                raise UserError(
                    f"{printable(root)}: a process that read it was killed, perhaps for memory; lower --processes"
                ) from None
    seconds = time.perf_counter() - start
    rate = len(manifest) / seconds
    log.info("%s\nmanifest: %s (%.1f s, %s images/s)", summary(manifest, report), out, seconds, f"{rate:,.0f}")


@contextmanager
def workers(processes: int) -> Iterator[Executor]:
    """Give a pool of forked processes, or of one thread: this command has no threads yet that a fork could harm."""
    if processes == 1:
        pool: Executor = ThreadPoolExecutor(1)
    else:
        pool = ProcessPoolExecutor(processes, get_context("fork"), initializer=_serve, initargs=(os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _serve(parent: int) -> None:
    """Ignore Ctrl-C and die with the parent: a surviving worker would keep the index locked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
