"""Requests to stop: a run ends in a checkpoint at the first, and at once if they go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cjepa_fast.run import checkpoint
from cjepa_fast.run.signals import InterruptFlag
from runs import ROOT, SMALL, metrics


@pytest.mark.parametrize(
    ("number", "launcher"),
    [
        (signal.SIGTERM, []),
        (signal.SIGUSR1, []),
        # as docs/cluster.md says; the launcher ends with 1 after any signal
        (signal.SIGUSR1, [
            "torch.distributed.run", "--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1",
            *(["--shutdown-timeout", "60"] if torch.__version__ >= "2.12" else []), "-m",
        ]),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGUSR1 torchrun"],
)  # fmt: skip
def test_a_request_to_stop_ends_in_a_checkpoint(
    images: Path, tmp_path: Path, number: signal.Signals, launcher: list[str]
) -> None:
    out = tmp_path / "run"
    arguments = [*SMALL, "--data.root", str(images), "--run.dir", str(out), "--optim.steps", "5000"]
    with subprocess.Popen(
        [sys.executable, "-m", *launcher, "cjepa_fast.train", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        while not (out / "metrics.jsonl").exists() or not metrics(out):
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(number)
        if not launcher:  # as a scheduler and torchrun may both send it
            time.sleep(0.02)
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == (1 if launcher else 0) and "continue with --resume" in output
    state = json.loads((out / "run_state.json").read_text())
    assert state["status"] == "preempted" and 0 < state["step"] < 5000
    assert (out / "checkpoints" / f"step-{state['step']:08d}" / checkpoint.MANIFEST).exists()


def test_a_second_request_to_stop_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    ended: list[int] = []
    clock = iter([100.0, 104.0, 106.0])
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    try:
        flag = InterruptFlag()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.is_set and not ended
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [143]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
