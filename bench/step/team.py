"""Trainers in processes of their own that take turns."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.records import ROOT, Row
from bench.step import trainers

LOSS_LIMITS = {"fp32": 1e-5, "bf16": 2e-2}  # relative difference of the first loss to ours
_ANSWER_S = 900
_TURN_S = 0.4  # least length of a turn


class Process:
    """A trainer in a process that runs `bench.step.worker`."""

    def __init__(self, task: Row, environment: dict[str, str] | None = None) -> None:
        self.name, self.began = task["rival"], time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.step.worker", json.dumps(task)], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self._rest = b""

    def send(self, command: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `receive` tells why

    def receive(self, seconds: float = _ANSWER_S) -> Row:
        """Return the answer to a command; a process that died or is silent gives a failure with its reason."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return {"status": "failed", "reason": f"no answer within {seconds:.0f} s"}
            if not (more := os.read(self._process.stdout.fileno(), 65536)):
                return {"status": "failed", "reason": f"its process ended with exit code {self._process.wait()}"}
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def ask(self, command: str, **arguments: Any) -> Row:
        self.send(command, **arguments)
        return self.receive()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


class Team:
    """Trainers of one model and mask mode that take turns; a context manager that ends their processes."""

    def __init__(self, device: str, precision: str, batch: int, model: str, masks: str, rounds: int) -> None:
        self.device, self.precision, self.rounds = device, precision, rounds
        self.task = {
            "device": device, "precision": precision, "batch": batch, "model": model, "masks": masks, "as_train": False,
        }  # fmt: skip
        self.members: dict[str, Process] = {}

    def start(self, names: Sequence[str]) -> dict[str, Row]:
        """Start trainers and return their answers to the first step; together on a GPU, as compiling takes long."""
        answers: dict[str, Row] = {}
        for name in names:
            self.members[name] = Process({**self.task, "rival": name})
            self.members[name].send("first")
            if self.device == "cpu":
                answers[name] = self.members[name].receive()
        for name in names:
            if name not in answers:
                answers[name] = self.members[name].receive()
        for name in names:  # a trainer that lacked memory beside the others may have it now
            if answers[name]["status"] == "out of memory":
                answers[name] = self.members[name].ask("first")
        return answers

    def take_turns(self, names: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, Row]]:
        """Return each trainer's milliseconds a step, round by round, and the answers of trainers that failed."""
        warm_up = 1 if self.device == "cuda" else 0
        steps, failures = {}, {}
        for name in names:
            answer = self.members[name].ask("run", steps=1, warm_up=2 * warm_up)
            if answer["status"] == "ok":
                steps[name] = max(1, round(1e3 * _TURN_S / answer["ms"]))
            else:
                failures[name] = answer
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(self.rounds):
            order = list(steps)
            for index in range(len(order)):
                name = order[(index + turn) % len(order)]  # the order turns: the trainer before leaves its heat
                answer = self.members[name].ask("run", steps=steps[name], warm_up=warm_up)
                if answer["status"] == "ok":
                    times[name].append(answer["ms"])
                else:
                    failures[name] = answer
            for name in failures:
                steps.pop(name, None)
                times.pop(name, None)
        return times, failures

    def close(self, name: str) -> None:
        self.members.pop(name).__exit__()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self.members):
            self.close(name)


def role(name: str) -> str:
    """Return "ours", "rival" or "yardstick" for a trainer's name."""
    kind = name.partition(":")[0]
    return "ours" if kind == "ours" else "yardstick" if kind in trainers.YARDSTICKS else "rival"


def judge(answers: dict[str, Row], precision: str) -> None:
    """Mark trainers as wrong whose first loss differs from ours (or, where ours did not run, from the first one's)."""
    losses = {n: a["loss"] for n, a in answers.items() if a["status"] == "ok" and role(n) != "yardstick"}
    if not losses:
        return
    truth = next((loss for name, loss in losses.items() if role(name) == "ours"), next(iter(losses.values())))
    for name, loss in losses.items():
        if not abs(loss - truth) <= LOSS_LIMITS[precision] * abs(truth):
            answers[name].update(status="wrong", reason=f"its first loss is {loss:.7g}, ours {truth:.7g}")
