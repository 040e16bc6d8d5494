"""A short real training by the main job, for its figures:  python -m bench.short_run --json FILE

Trains `cifar10_tiny` on the images at --data or $BENCH_CIFAR, or the demo on the images that it makes, for --steps
steps with a temporary run directory. FILE gets the run's own records: every line of metrics, the 20-NN probe of the
untrained and of the trained encoder, and the exit code of the training, which is also that of this command.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import records
from cjepa_fast.config.presets import PRESETS


def preset(root: str | None) -> str:
    """Return the preset that is trained."""
    return "cifar10_tiny" if root else "demo"


def command(root: str | None, steps: int, directory: Path) -> list[str]:
    """Return the command of the training."""
    options = {
        "--preset": preset(root), "--optim.steps": steps, "--run.dir": directory,
        "--optim.warmup-epochs": 0.2 if steps >= 100 else 0.0, "--run.log-every": max(1, steps // 20),
        **({"--data.root": root} if root else {}),
    }  # fmt: skip
    return [sys.executable, "-m", "cjepa_fast.train", *(str(part) for option in options.items() for part in option)]


def summary(lines: list[dict[str, Any]], state: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Return the figures of a run; rates leave out its first line of metrics, which includes compiling."""
    steady = lines[1:] or lines
    rate = statistics.median(line["images_per_s"] for line in steady)
    return {
        "status": state["status"], "steps": lines[-1]["step"], "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"], "images_per_s": rate,
        "share_waited": statistics.median(line["data_wait_ms"] for line in steady) * rate / batch_size / 1e3,
        "feature_std": lines[-1]["feature_std"], "knn_untrained": state.get("untrained"),
        "knn_trained": state.get("knn_top1"),
    }  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    """Return the figures as a table."""
    shown = {key: value for key, value in record.items() if key not in ("environment", "metrics")}
    cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown.values()]
    return "\n".join(["A short training:", "", *records.table("|".join(shown), [cells])]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("BENCH_CIFAR"), help="a data.root of small images [made]")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="short-run-") as work:
        directory = Path(work) / "run"
        code = subprocess.run(command(arguments.data, arguments.steps, directory), cwd=records.ROOT).returncode
        lines = records.read(directory / "metrics.jsonl")
        if not lines:
            return code or 1
        state = json.loads((directory / "run_state.json").read_text())
        figures = summary(lines, state, PRESETS[preset(arguments.data)].optim.batch_size)
    environment = records.environment("cuda" if torch.cuda.is_available() else "cpu")
    record = {"environment": environment, "data": arguments.data or "demo", "exit_code": code, **figures}
    records.write(arguments.json, json.dumps({**record, "metrics": lines}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
