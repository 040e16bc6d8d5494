"""Times the feed against its rivals, and how long training waits for it:  python -m bench.data [--imagenet PATH ...]

Images a second, by the clock and per second of all processors used, of ours and of every other reader in
bench/readers.py, on ImageNet's JPEGs at 224 px and CIFAR's at 32 px from a warm cache. Then some steps of the main job
with the feed: the wait of every step (bench/waits.py). Before a reader is timed its images must have the right size and
the statistics that Pillow finds. Without --imagenet or --cifar JPEGs are made, and the rows say so. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import run
from bench.readers import MEAN, STD, Images, Pillow, lay_out, random_window, read_jpegs, readers, synthetic_jpegs
from bench.waits import waits_in_training
from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import MAX_PIXELS
from cjepa_fast.feed.manifest import ENTRY, Manifest, Strings
from cjepa_fast.feed.scan import inspect_files

Row = dict[str, Any]

CHECKED = 512  # images that a reader is judged by; with --quick a quarter
# what is compared with Pillow's images, each a mean over images and a spread between them
FEATURES = ("red", "green", "blue", "red - blue", "contrast", "top - bottom", "left - right", "detail")
_SIGMAS, _SLACK = 5.0, 2.0  # standard errors and levels (of 255) that a mean may differ by
_HANG_S = 120.0  # for one answer of a reader


# --- is it the right work?


class Seen(NamedTuple):
    """What a reader made of some images."""

    shape: tuple[int, ...]  # of a batch, [b, H, W, 3]
    features: np.ndarray  # [n, len(FEATURES)], in levels of 0 to 255


def as_pixels(batch: Tensor) -> np.ndarray:
    """A batch as float32 [b, H, W, 3] of 0 to 255, whether it is uint8 NHWC or normalised float NCHW."""
    batch = batch.cpu()
    if batch.dtype == torch.uint8:
        return batch.float().numpy()
    return (batch.permute(0, 2, 3, 1).numpy() * STD + MEAN) * 255


def features(pixels: np.ndarray) -> np.ndarray:
    """FEATURES of every image: [b, H, W, 3] to [b, 8]."""
    half_h, half_w = pixels.shape[1] // 2, pixels.shape[2] // 2
    red, green, blue = pixels.mean(axis=(1, 2)).T
    grey = pixels.mean(axis=3)
    top_bottom = grey[:, :half_h].mean(axis=(1, 2)) - grey[:, half_h:].mean(axis=(1, 2))
    left_right = grey[:, :, :half_w].mean(axis=(1, 2)) - grey[:, :, half_w:].mean(axis=(1, 2))
    detail = np.abs(np.diff(grey, axis=2)).mean(axis=(1, 2))
    columns = (red, green, blue, red - blue, grey.std(axis=(1, 2)), top_bottom, left_right, detail)
    return np.stack(columns, axis=1)


def look(batches: Any, count: int) -> Seen:
    """The first `count` images or more of a stream."""
    found, n, shape = [], 0, ()
    while n < count:
        pixels = as_pixels(next(batches))
        if pixels.ndim != 4 or (shape and pixels.shape != shape):
            raise ValueError(f"a batch of shape {pixels.shape}")
        shape = pixels.shape
        found.append(features(pixels))
        n += len(pixels)
    return Seen(tuple(shape), np.concatenate(found))


def look_with_pillow(images: Images, count: int) -> Seen:
    """The truth: random crops by Pillow, resized with antialias."""
    from PIL import Image

    paths, views = Pillow(images).paths, []
    for i in np.random.default_rng(1).permutation(len(paths))[:count]:
        with Image.open(paths[i]) as image:
            top, left, h, w = random_window(image.height, image.width)
            box = (left, top, left + w, top + h)
            small = image.convert("RGB").resize((images.size, images.size), Image.Resampling.BILINEAR, box)
            views.append(np.asarray(small, dtype=np.float32))
    pixels = np.stack(views)
    return Seen((images.batch_size, *pixels.shape[1:]), features(pixels))


def implausible(found: Seen, truth: Seen) -> str | None:
    """Why these cannot be random crops of the images that `truth` shows, None if they may be.

    The means of every feature may differ by five standard errors and two levels; the spread of the colours between
    images by a third. Detail, which tells whether an image was resized with antialias, may differ by a third. Nine of
    ten images must be different from all others.
    """
    if found.shape != truth.shape:
        return f"batches of {found.shape} instead of {truth.shape}"
    different = len(np.unique(found.features, axis=0))
    for k, name in enumerate(FEATURES):
        a, b = found.features[:, k], truth.features[:, k]
        error = float(np.sqrt(a.var() / len(a) + b.var() / len(b)))
        limit = b.mean() / 3 if name == "detail" else _SIGMAS * error + _SLACK
        if not abs(a.mean() - b.mean()) <= limit:
            return f"{name} is {a.mean():.1f} on average instead of {b.mean():.1f}"
        if name in ("red", "green", "blue") and not 2 / 3 < a.std() / b.std() < 3 / 2:
            return f"{name} differs by {a.std():.1f} between images instead of {b.std():.1f}"
    if different < 0.9 * len(found.features):
        return f"only {different} of {len(found.features)} images are different"
    return None


# --- measuring one reader, in a process of its own


def family(root: int) -> dict[int, float]:
    """A process and all that descend from it: id to processor seconds, with those of its children that ended."""
    tick, parents, seconds = os.sysconf("SC_CLK_TCK"), {}, {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it may end meanwhile
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                seconds[int(entry.name)] = sum(map(int, fields[11:15])) / tick
    found, level = set(), {root}
    while level:
        found |= level
        level = {pid for pid, parent in parents.items() if parent in level}
    return {pid: seconds[pid] for pid in found & seconds.keys()}


def family_cpu_s() -> float:
    return sum(family(os.getpid()).values())


def time_slot(batches: Any, threads: int, seconds: float, wait: Callable[[], None]) -> Row:
    """Images, seconds and processor seconds of a stream in its steady state, of at least `seconds`.

    What lay ready is taken first. Worker processes finish together, so the window is a multiple of their batches.
    """
    for _ in range(2 * threads + 4):
        next(batches)
    wait()
    images, count = 0, 0
    begin, cpu = time.perf_counter(), family_cpu_s()
    while time.perf_counter() - begin < seconds or count % threads:
        images += len(next(batches))
        count += 1
    wait()
    used = max(family_cpu_s() - cpu, 1 / os.sysconf("SC_CLK_TCK"))  # the system counts in ticks
    return {"images": images, "wall_s": time.perf_counter() - begin, "cpu_s": used}


def serve(connection: Connection, device: str, threads: int, name: str | None) -> None:
    """Answers ("look", images), ("time", images, seconds) or ("waits", ...) until None comes."""
    torch.set_num_threads(1)
    reader = next((reader for reader in readers(device, threads) if reader.name == name), None)
    while task := _next_task(connection):
        what, *given = task
        try:
            if what == "waits":
                answer = waits_in_training(*given, device=device, threads=threads)
            else:
                assert reader is not None
                images, amount = given
                own = reader.threads or threads
                batches = reader.open(images, own)
                try:
                    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
                    answer = look(batches, amount) if what == "look" else time_slot(batches, own, amount, wait)
                finally:
                    batches.close()  # type: ignore[attr-defined]
        except Exception as error:  # rivals refuse in many ways; each is named and the rest is timed
            answer = run.first_line(error)
        connection.send(answer)


def _next_task(connection: Connection) -> tuple[Any, ...] | None:
    try:
        return connection.recv()
    except EOFError:  # whoever asks is gone
        return None


class Served:
    """A process that answers for one reader; started when it is first asked."""

    def __init__(self, device: str, threads: int, name: str | None) -> None:
        self._arguments, self._process = (device, threads, name), None

    def ask(self, *task: Any, patience: float = _HANG_S) -> Any:
        """The answer, or a string that says what went wrong."""
        if self._process is None:
            # children of a process that has imported torch, but started no thread and no GPU
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["bench.readers", "bench.waits"])
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs, *self._arguments))
            self._process.start()
            theirs.close()
        try:
            self._connection.send(task)
            if self._connection.poll(patience):
                return self._connection.recv()
            said = f"no answer for {patience:.0f} s"
        except (EOFError, OSError):
            self._process.join()
            said = f"its process died (exit code {self._process.exitcode})"
        self.end(patience=0.0)
        return said

    def end(self, patience: float = 5.0) -> None:
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(patience)
        for pid in family(self._process.pid or 0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.join()
        self._process = None


# --- figures


def figures(slots: Sequence[Row]) -> Row:
    """Rates of several rounds: median, 20th and 80th percentile, by the clock and per processor second."""
    rates = {
        "images_per_s": [slot["images"] / slot["wall_s"] for slot in slots],
        "images_per_cpu_s": [slot["images"] / slot["cpu_s"] for slot in slots],
    }
    found: Row = {"rounds": len(slots)}
    for name, values in rates.items():
        p20, p80 = np.percentile(values, [20, 80]).tolist()
        found |= {name: statistics.median(values), f"{name}_p20": p20, f"{name}_p80": p80}
    return found | {"cores_used": statistics.median(slot["cpu_s"] / slot["wall_s"] for slot in slots)}


def compare(rows: Sequence[Row]) -> None:
    """Adds how many times the best rival's rate each rate is."""
    timed = [row for row in rows if "images_per_s" in row]
    rivals = [row for row in timed if row["role"] == "rival"]
    for row in timed if rivals else []:
        for name in ("images_per_s", "images_per_cpu_s"):
            row[f"{name}_over_best_rival"] = row[name] / max(rival[name] for rival in rivals)


def time_readers(
    images: Images, device: str, threads: int, served: dict[str, Served], *, checked: int, rounds: int,
    seconds: float, deadline: float,
) -> list[Row]:  # fmt: skip
    """A row for every reader; those that cannot run or are wrong have a reason instead of figures."""
    truth = look_with_pillow(images, checked)
    rows, slots = {}, {}
    to_time = time.monotonic() + 0.6 * (deadline - time.monotonic())
    for reader in readers(device, threads):
        row: Row = {"variant": reader.name, "role": reader.role, "delivers": reader.delivers, "status": "ok",
                    "threads_used": reader.threads or threads, "reason": None}  # fmt: skip
        rows[reader.name] = row
        if time.monotonic() > to_time:
            row.update(status="not run", reason="out of time")
        elif reader.obstacle:
            row.update(status="cannot run", reason=reader.obstacle)
        elif isinstance(seen := served[reader.name].ask("look", images, checked), str):
            row.update(status="failed" if reader.role == "ours" else "cannot run", reason=seen)
        elif wrong := implausible(seen, truth):
            row.update(status="wrong", reason=wrong)
        else:
            slots[reader.name] = []
    names = list(slots)
    for turn in range(rounds):
        if turn and time.monotonic() > deadline:
            break
        for k in range(len(names)):  # the order turns, as what ran before leaves its heat and its cache
            name = names[(k + turn) % len(names)]
            if rows[name]["status"] != "ok":
                continue
            measured = served[name].ask("time", images, seconds)
            if isinstance(measured, str):
                rows[name].update(status="failed" if rows[name]["role"] == "ours" else "cannot run", reason=measured)
            else:
                slots[name].append(measured)
    for name, row in rows.items():
        if row["status"] == "ok":
            row.update(figures(slots[name]))
    compare(list(rows.values()))
    return list(rows.values())


# --- the index


def index_rates(images: Images, entries: int, repeats: int = 3) -> Row:
    """Thorough indexing of the files in one thread, and a manifest of `entries` made up ones opened anew.

    The rate is over processor seconds, the best of `repeats`.
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
    """Processor seconds and MiB that it takes to open a manifest and read its columns and a path, in a new process."""
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
    """Named as ImageNet's images are, in a thousand classes."""
    entries = np.zeros(n, dtype=ENTRY)
    entries["bytes"], entries["container"] = np.arange(n), np.arange(n) % 1000
    entries["label"] = entries["container"]
    classes = [f"n{i:08d}" for i in range(1000)]
    meta = {"root": "/r", "kind": "folder", "base": "/r", "mode": "quick", "max_pixels": MAX_PIXELS, "classes": classes,
            "description": "", "left_out": {}, "pattern": ""}  # fmt: skip
    names = Strings.pack([f"n01440764_{i}.JPEG" for i in range(n)])
    return Manifest(meta, entries, names, Strings.pack(classes), Strings.pack([]), np.zeros((0, 2), "<i8"))


# --- the table


def markdown(rows: Sequence[Row]) -> str:
    """Tables of rates and of waits."""
    if not rows:
        return ""
    parts = [f"## data\n\n{run.where(rows)} {rows[0]['workers']} threads or worker processes.\n"]
    parts += [f"{_index_line(row)}\n" for row in rows if row["case"] == "index"]
    rates = [row for row in rows if row["case"] not in ("index", "waits")]
    if rates:
        parts.append(
            "| images | reader | images/s [p20, p80] | images/s per core [p20, p80] | x best rival | x best rival per "
            "core | note |\n|" + " --- |" * 7
        )
        parts[-1] += "".join(f"\n{_rate_line(row)}" for row in rates) + "\n"
    waits = [row for row in rows if row["case"] == "waits"]
    if waits:
        parts.append(
            "| waits of | images | batch | step ms | step ms without the feed | wait ms: median, p95, most | share of "
            "the time waited | steps over 1 ms, over 1 % | note |\n|" + " --- |" * 9
        )
        parts[-1] += "".join(f"\n{_wait_line(row)}" for row in waits) + "\n"
    return "\n".join(parts)


def _note(row: Row) -> str:
    notes = [] if row["status"] == "ok" else [row["status"] + (f": {row['reason']}" if row["reason"] else "")]
    if row.get("delivers"):
        notes.append(row["delivers"])
    if row.get("precision"):
        notes.append(f"{row['precision']}, {row['compiled']}")
    return "; ".join(notes).replace("|", "/")


def _rate_line(row: Row) -> str:
    def rate(name: str) -> str:
        return f"{row[name]:,.0f} [{row[f'{name}_p20']:,.0f}, {row[f'{name}_p80']:,.0f}]" if name in row else ""

    def ratio(name: str) -> str:
        return f"{row[f'{name}_over_best_rival']:.2f}" if f"{name}_over_best_rival" in row else ""

    name = f"**{row['variant']}**" if row["role"] == "ours" else row["variant"] or ""
    both = ("images_per_s", "images_per_cpu_s")
    return "| " + " | ".join([row["case"], name, *map(rate, both), *map(ratio, both), _note(row)]) + " |"


def _index_line(row: Row) -> str:
    if row["status"] != "ok":
        return f"index: {_note(row)}"
    return (
        f"index: {row['indexed_per_cpu_s']:,.0f} of {row['images']} images a second and core (thorough); a manifest of "
        f"{row['entries']:,} entries and {row['file_mib']:.0f} MiB opens in {row['load_s']:.2f} s and takes "
        f"{row['load_mib']:.0f} MiB of memory"
    )


def _wait_line(row: Row) -> str:
    if "step_ms" not in row:
        return f"| {row['variant']} | {row['images'] or ''} |" + " |" * 6 + f" {_note(row)} |"
    waits = ", ".join(f"{row[name]:.2f}" for name in ("wait_ms_median", "wait_ms_p95", "wait_ms_max"))
    cells = [
        row["variant"], row["images"], str(row["batch_size"]), f"{row['step_ms']:.1f}",
        f"{row['step_ms_without_feed']:.1f}", waits, f"{row['share_waited']:.2%}",
        f"{row['steps_over_1_ms']:.0%}, {row['steps_over_1_percent']:.0%}", _note(row),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


# --- the command


def main(argv: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", metavar="PATH", default=os.environ.get("BENCH_IMAGENET") or None,
                        help="folder, shards or another source for 224 px [$BENCH_IMAGENET, else made up]")  # fmt: skip
    parser.add_argument("--cifar", metavar="PATH", default=os.environ.get("BENCH_CIFAR") or None,
                        help="the same for 32 px [$BENCH_CIFAR, else made up]")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=("imagenet", "cifar", "index", "waits"), help="leave out the rest")
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
    arguments = parser.parse_args(argv)
    try:
        return benchmark(arguments, "cuda" if gpu else "cpu")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def benchmark(arguments: argparse.Namespace, device: str) -> int:
    start, quick, threads = time.monotonic(), arguments.quick, arguments.threads
    if importlib.util.find_spec("PIL") is None:
        raise UserError("Pillow is not installed, and it tells what the images must look like; pip install pillow")
    # half the time for ImageNet, a quarter for CIFAR, the rest for the waits
    deadlines = {"imagenet": start + 0.5 * arguments.seconds, "cifar": start + 0.75 * arguments.seconds}
    common = {
        "op": "data", "device": device, "dtype": "uint8", "quick": quick, "workers": threads,
        **run.environment(device), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gated": True, "rehearsal": arguments.rehearsal,
        "libraries": _libraries(),
    }  # fmt: skip
    rows: list[Row] = []

    def publish(row: Row) -> None:
        rows.append({**common, **row})
        if arguments.json is not None:
            with arguments.json.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        print({"waits": _wait_line, "index": _index_line}.get(row["case"], _rate_line)(row), flush=True)

    wanted = arguments.only or ["imagenet", "cifar", "index", "waits"]
    served = {r.name: Served(device, threads, r.name) for r in readers(device, threads)}
    with tempfile.TemporaryDirectory(prefix="bench-data-") as work:
        os.environ["CJEPA_CACHE"] = str(Path(work) / "cache")  # inherited: no index is left behind
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        try:
            laid_out = _images(arguments, Path(work), device, wanted)
            for kind, images in laid_out.items():
                if kind not in wanted:
                    continue
                timed = time_readers(
                    images, device, threads, served, deadline=deadlines[kind],
                    checked=CHECKED // 4 if quick else CHECKED, rounds=arguments.rounds or (2 if quick else 5),
                    seconds=arguments.window or (0.2 if quick else 1.0),
                )  # fmt: skip
                for row in timed:
                    publish({"case": f"{images.name} at {images.size} px", "images": images.name, **row})
            for reader in served.values():
                reader.end()
            if "index" in wanted:
                images = laid_out["imagenet"]
                about = {"case": "index", "variant": "index", "role": "ours", "images": images.name}
                measured = index_rates(images, 10_000 if quick else 1_000_000)
                publish({**about, "status": "ok", "reason": None, **measured})
            for preset in (arguments.preset or _presets(device, quick)) if "waits" in wanted else []:
                about = {"case": "waits", "variant": preset, "role": "ours", "images": None}
                if time.monotonic() > start + arguments.seconds:
                    publish({**about, "status": "not run", "reason": "out of time"})
                    continue
                job = Served(device, threads, None)
                steps = arguments.steps or (6 if quick else 40)
                answer = job.ask("waits", preset, laid_out, steps, arguments.compile, patience=600)
                job.end()
                failed = {"status": "failed", "reason": answer}
                publish(
                    {**about, **(failed if isinstance(answer, str) else {"status": "ok", "reason": None, **answer})}
                )
        finally:
            for reader in served.values():
                reader.end()
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(rows))
    return 0 if all(row["role"] != "ours" or row["status"] in ("ok", "not run") for row in rows) else 1


def _libraries() -> dict[str, str]:
    """Versions of those that are installed."""
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
    """The images to read, laid out below `work`; those that no path is given for are made. Waits may want either."""
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


if __name__ == "__main__":
    sys.exit(main())
