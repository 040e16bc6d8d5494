"""Readers in processes of their own, and the rates measured there."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.feed import plausible
from bench.feed.images import Images
from bench.feed.readers import readers
from bench.feed.waits import waits_in_training
from bench.records import Row, first_line

_PATIENCE_S = 120.0  # for an answer of a reader


def family(root: int) -> dict[int, float]:
    """Return processor seconds, ended children included, of a process and its descendants by process id."""
    tick, parents, seconds = os.sysconf("SC_CLK_TCK"), {}, {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # a process may end meanwhile
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                seconds[int(entry.name)] = sum(map(int, fields[11:15])) / tick
    found, level = set(), {root}
    while level:
        found |= level
        level = {pid for pid, parent in parents.items() if parent in level}
    return {pid: seconds[pid] for pid in found & seconds.keys()}


def family_cpu_s() -> float:
    """Return the processor seconds of this process and its descendants."""
    return sum(family(os.getpid()).values())


def time_slot(batches: Any, threads: int, seconds: float, wait: Callable[[], None]) -> Row:
    """Measure images, seconds and processor seconds of a stream in its steady state, over at least `seconds`.

    Batches that were ready are taken first. Worker processes finish together, so the window is a multiple of their
    batches.
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
    used = max(family_cpu_s() - cpu, 1 / os.sysconf("SC_CLK_TCK"))  # the kernel counts in ticks
    return {"images": images, "wall_s": time.perf_counter() - begin, "cpu_s": used}


def serve(connection: Connection, device: str, threads: int, name: str | None) -> None:
    """Answer ("look", images), ("time", images, seconds) or ("waits", ...) until None comes."""
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
                    answer = (
                        plausible.look(batches, amount) if what == "look" else time_slot(batches, own, amount, wait)
                    )
                finally:
                    batches.close()  # type: ignore[attr-defined]
        except Exception as error:  # rivals refuse in many ways; each is named and the rest is timed
            answer = first_line(error)
        connection.send(answer)


def _next_task(connection: Connection) -> tuple[Any, ...] | None:
    try:
        return connection.recv()
    except EOFError:  # the parent is gone
        return None


class Served:
    """A process that answers for one reader; the first question starts it."""

    def __init__(self, device: str, threads: int, name: str | None) -> None:
        self._arguments, self._process = (device, threads, name), None

    def ask(self, *task: Any, patience: float = _PATIENCE_S) -> Any:
        """Return the answer, or a string that says what went wrong."""
        if self._process is None:
            # fork from a process that has imported torch, but started no thread and no GPU
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["bench.feed.readers", "bench.feed.waits"])
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
        """End the process and all its descendants."""
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


def figures(slots: Sequence[Row]) -> Row:
    """Return the rates of several rounds by the clock and per processor second: median, 20th and 80th percentile."""
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
    """Add to each rate its ratio to the best rival's."""
    timed = [row for row in rows if "images_per_s" in row]
    rivals = [row for row in timed if row["role"] == "rival"]
    for row in timed if rivals else []:
        for name in ("images_per_s", "images_per_cpu_s"):
            row[f"{name}_over_best_rival"] = row[name] / max(rival[name] for rival in rivals)


def time_readers(
    images: Images, device: str, threads: int, served: dict[str, Served], *, checked: int, rounds: int,
    seconds: float, deadline: float,
) -> list[Row]:  # fmt: skip
    """Return a row for every reader; one that cannot run or is wrong has a reason instead of figures."""
    truth = plausible.look_with_pillow(images, checked)
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
        elif wrong := plausible.implausible(seen, truth):
            row.update(status="wrong", reason=wrong)
        else:
            slots[reader.name] = []
    names = list(slots)
    for turn in range(rounds):
        if turn and time.monotonic() > deadline:
            break
        for k in range(len(names)):  # the order turns: the reader before leaves its heat and its cache
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
