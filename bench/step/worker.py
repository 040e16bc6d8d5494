"""One trainer in its own process, for `bench.step`:  python -m bench.step.worker '{...}'

Each process has its own allocator and memory, and a failure ends no other trainer. Commands and answers are JSON
objects, one a line. An idle process gives the GPU's memory back.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.feed.images import Images
from bench.step import loaders, trainers
from bench.step.references import Batch, Trainer
from bench.training import keep_freed_memory


class Worker:
    """`task`: model, masks, rival, batch, device, precision, as_train; see `bench.step`."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.device = torch.device(task["device"])
        self.config = trainers.configure(task["model"], task["masks"], task["precision"])
        samples = trainers.sample(self.config, task["batch"], 2)
        self.tokens = {
            "context_tokens": trainers.mean_context(samples[0].masks),
            "target_tokens": samples[0].masks.target.shape[2],
        }
        self.spec = trainers.Spec.parse(task["rival"])
        if self.device.type == "cpu":
            keep_freed_memory()
        self.trainer: Trainer = trainers.build(self.spec, self.config, self.device, as_train=task["as_train"])
        self.batches: list[Batch] = [self.trainer.batch(drawn) for drawn in samples]
        self.steps = 0
        self.fed: loaders.Feed | None = None

    def first(self) -> dict[str, Any]:
        """Take the first step; every trainer must have the same loss."""
        loss = self._step()
        self._synchronize()
        answer = {"loss": float(loss), "finite": math.isfinite(loss), **self.tokens}
        return {**answer, "note": getattr(self.trainer, "note", None), "done_at": time.time()}

    def run(self, steps: int, warm_up: int) -> dict[str, Any]:
        """Return milliseconds a step."""
        for _ in range(warm_up):
            self._step()
        self._synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        self._synchronize()
        return {"ms": (time.perf_counter() - start) * 1e3 / steps}

    def phases(self, steps: int, warm_up: int) -> dict[str, Any]:
        """Return milliseconds of each phase, with a wait for the device at its end."""
        spent: dict[str, float] = {}
        last = 0.0

        def mark(phase: str) -> None:
            nonlocal last
            self._synchronize()
            now = time.perf_counter()
            spent[phase] = spent.get(phase, 0.0) + (now - last) * 1e3
            last = now

        for step in range(warm_up + steps):
            if step == warm_up:
                spent.clear()
            self._synchronize()
            last = time.perf_counter()
            self.trainer.step(self._next(), mark)
        return {"phases": {phase: milliseconds / steps for phase, milliseconds in spent.items()}}

    def feed(self, images: dict[str, Any], threads: int, steps: int, warm_up: int) -> dict[str, Any]:
        """Return milliseconds a step fed from JPEGs, and the part spent waiting for the batch."""
        if self.fed is None:
            where = Images(**{**images, "folder": Path(images["folder"])})
            make = loaders.FEEDS[self.spec.name]
            self.fed = make(self.trainer, self.config, where, threads, self.device)
        waited = began = 0.0
        for step in range(warm_up + steps):
            self._synchronize()
            begin = time.perf_counter()
            if step == warm_up:
                waited, began = 0.0, begin
            batch = next(self.fed.batches)
            waited += time.perf_counter() - begin
            self.trainer.step(batch)
        self._synchronize()
        answer = {"ms": (time.perf_counter() - began) * 1e3 / steps, "wait_ms": waited * 1e3 / steps}
        return {**answer, "mask_us": self.fed.mask_us, "note": self.fed.note}

    def memory(self) -> dict[str, Any]:
        """Return the peak in MiB: of torch's allocator on a GPU, of the whole process on a CPU."""
        if self.device.type == "cuda":
            return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20}
        for line in Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else ():
            if line.startswith("VmHWM"):
                return {"peak_mib": int(line.split()[1]) / 2**10}
        return {"peak_mib": None}

    def park(self) -> None:
        """Give the GPU's free memory back."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _next(self) -> Batch:
        self.steps += 1
        return self.batches[self.steps % len(self.batches)]

    def _step(self) -> Any:
        return self.trainer.step(self._next())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def serve(task: dict[str, Any], commands: TextIO, answers: TextIO) -> None:
    worker: Worker | None = None
    for line in commands:
        command = json.loads(line)
        try:
            if worker is None:
                worker = Worker(task)
            answer = {"status": "ok", **getattr(worker, command.pop("do"))(**command)}
        except trainers.CannotRun as error:
            answer = {"status": "cannot run", "reason": str(error)}
        except torch.OutOfMemoryError as error:
            answer = {"status": "out of memory", "reason": str(error).splitlines()[0]}
        except Exception as error:  # rivals fail in many ways; each is named and the rest is timed
            lines = str(error).strip().splitlines()
            answer = {"status": "failed", "reason": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}
        if worker is not None:
            worker.park()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> int:
    # answers have their own channel, so libraries may print: their output goes to stderr
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
