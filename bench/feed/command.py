"""Times the feed against its rivals, and the wait of training for it:  python -m bench.data [--imagenet PATH ...]

Images a second, by the clock and per second of all processors used, of ours and of every other reader in
bench/feed/readers.py, on ImageNet's JPEGs at 224 px and CIFAR's at 32 px from a warm cache. Then some steps of the main
job with the feed: the wait of every step (bench/feed/waits.py). Before a reader is timed its images must have the right
size and the statistics of Pillow's. Without --imagenet or --cifar JPEGs are made, and the rows say so. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import records
from bench.feed import report
from bench.feed.images import Images, lay_out, read_jpegs, synthetic_jpegs
from bench.feed.index import index_rates
from bench.feed.plausible import CHECKED
from bench.feed.readers import readers
from bench.feed.serve import Served, time_readers
from bench.records import Row
from cjepa_fast.errors import UserError

KINDS = ("imagenet", "cifar", "index", "waits")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return benchmark(arguments, device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def benchmark(arguments: argparse.Namespace, device: str) -> int:
    if importlib.util.find_spec("PIL") is None:
        raise UserError("Pillow is not installed, and its crops are the truth; pip install pillow")
    common = {
        "op": "data", "device": device, "dtype": "uint8", "quick": arguments.quick, "workers": arguments.threads,
        **records.environment(device), "date": records.now(), "gated": True, "rehearsal": arguments.rehearsal,
        "libraries": _libraries(),
    }  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-data-") as work:
        os.environ["CJEPA_CACHE"] = str(Path(work) / "cache")  # inherited: no index is left behind
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        for row in measured(arguments, device, Path(work)):
            rows.append({**common, **row})
            records.append(arguments.json, rows[-1])
            print(report.line(row), flush=True)
    if arguments.markdown is not None:
        arguments.markdown.write_text(report.markdown(rows))
    return 0 if all(row["role"] != "ours" or row["status"] in ("ok", "not run") for row in rows) else 1


def measured(arguments: argparse.Namespace, device: str, work: Path) -> Iterator[Row]:
    """Yield the rows of everything that is wanted, as they are measured."""
    start, quick, threads = time.monotonic(), arguments.quick, arguments.threads
    # half the time for ImageNet, a quarter for CIFAR, the rest for the waits
    deadlines = {"imagenet": start + 0.5 * arguments.seconds, "cifar": start + 0.75 * arguments.seconds}
    wanted = arguments.only or KINDS
    laid_out = _images(arguments, work, device, wanted)
    served = {reader.name: Served(device, threads, reader.name) for reader in readers(device, threads)}
    try:
        for kind in [kind for kind in laid_out if kind in wanted]:
            images = laid_out[kind]
            timed = time_readers(
                images, device, threads, served, deadline=deadlines[kind], checked=CHECKED // 4 if quick else CHECKED,
                rounds=arguments.rounds or (2 if quick else 5), seconds=arguments.window or (0.2 if quick else 1.0),
            )  # fmt: skip
            for row in timed:
                yield {"case": f"{images.name} at {images.size} px", "images": images.name, **row}
    finally:
        for reader in served.values():
            reader.end()
    if "index" in wanted:
        images = laid_out["imagenet"]
        figures = index_rates(images, 10_000 if quick else 1_000_000)
        yield {"case": "index", "variant": "index", "role": "ours", "images": images.name, "status": "ok",
               "reason": None, **figures}  # fmt: skip
    for preset in (arguments.preset or _presets(device, quick)) if "waits" in wanted else []:
        about = {"case": "waits", "variant": preset, "role": "ours", "images": None}
        if time.monotonic() > start + arguments.seconds:
            yield {**about, "status": "not run", "reason": "out of time"}
            continue
        job, steps = Served(device, threads, None), arguments.steps or (6 if quick else 40)
        try:
            answer = job.ask("waits", preset, laid_out, steps, arguments.compile, patience=600)
        finally:
            job.end()
        failed = {"status": "failed", "reason": answer}
        yield {**about, **(failed if isinstance(answer, str) else {"status": "ok", "reason": None, **answer})}


def _libraries() -> dict[str, str]:
    """Return the versions of the installed libraries."""
    names = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "pillow", "torchvision", "opencv-python-headless",
             "opencv-python", "simplejpeg", "PyTurboJPEG", "webdataset", "ffcv", "datasets")  # fmt: skip
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _presets(device: str, quick: bool) -> list[str]:
    if device == "cpu":
        return ["cifar10_tiny"]
    large = ["cjepa_vit_base16_in1k", "cjepa_vit_large16_in1k", "ijepa_vit_huge14_in1k"]
    return ["cjepa_vit_small16_in1k", *([] if quick else large)]


def _images(arguments: argparse.Namespace, work: Path, device: str, wanted: Sequence[str]) -> dict[str, Images]:
    """Lay out the images to read below `work`; images without a path are made. The waits may need both kinds."""
    shards, quick = arguments.threads, arguments.quick
    found = {}
    for kind, path, size, (height, width), limit, batch_size in (
        ("imagenet", arguments.imagenet, 224, (375, 500), 64 if quick else 1000, 64),
        ("cifar", arguments.cifar, 32, (32, 32), 512 if quick else 10_000, 256),
    ):
        if kind not in wanted and "waits" not in wanted and (kind, "index" in wanted) != ("imagenet", True):
            continue
        encoded = read_jpegs(path, limit) if path else synthetic_jpegs(height, width, min(limit, 512))
        name = kind if path else f"synthetic {width}x{height}"
        batch_size = min(len(encoded), 256 if device == "cuda" else 16 if quick else batch_size)
        found[kind] = lay_out(encoded, work / kind, name=name, size=size, batch_size=batch_size, shards=shards)
    return found


def _parser() -> argparse.ArgumentParser:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", metavar="PATH", default=os.environ.get("BENCH_IMAGENET") or None,
                        help="folder, shards or another source for 224 px [$BENCH_IMAGENET, else made up]")  # fmt: skip
    parser.add_argument("--cifar", metavar="PATH", default=os.environ.get("BENCH_CIFAR") or None,
                        help="the same for 32 px [$BENCH_CIFAR, else made up]")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=KINDS, help="leave out the rest")
    parser.add_argument("--threads", type=int, default=min(cores, 16), help="of every reader [cores, at most 16]")
    parser.add_argument("--rounds", type=int, help="[5, with --quick 2]")
    parser.add_argument("--window", type=float, help="seconds that a round times a reader [1, with --quick 0.2]")
    parser.add_argument("--preset", nargs="+", help="whose steps wait for data [by device]")
    parser.add_argument("--steps", type=int, help="timed of each preset [40, with --quick 6]")
    parser.add_argument("--compile", choices=("auto", "static", "dynamic", "off"), default="auto",
                        help="for the presets [auto]")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after this [no limit]")
    parser.add_argument("--json", type=Path, help="append one JSON object a line, as results come")
    parser.add_argument("--markdown", type=Path, help="write tables")
    parser.add_argument("--quick", action="store_true", help="few images, short measurements")
    parser.add_argument("--rehearsal", action="store_true", help=argparse.SUPPRESS)
    return parser
