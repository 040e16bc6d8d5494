"""The run directory: the settings, the measurements and the end of a run.

RUN/config.yaml      every setting, resolved
RUN/metrics.jsonl    one JSON object a line, one line an interval
RUN/run_state.json   status (running, completed, preempted, failed), last step, last probe
RUN/checkpoints/     see cjepa_fast.run.checkpoint
RUN/index/           the manifests of data.root, see cjepa_fast.feed.index
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from cjepa_fast.errors import UserError

METRICS, STATE, CONFIG, CHECKPOINTS, INDEX = "metrics.jsonl", "run_state.json", "config.yaml", "checkpoints", "index"
COLUMNS = {
    "epoch": ".2f", "loss": ".4f", "feature_std": ".3f", "rankme": ".1f", "cosine_gap": ".3f", "knn_top1": ".1%",
    "images_per_s": ",.0f", "data_wait_ms": ".2f",
}  # fmt: skip


def refuse_existing(directory: Path) -> None:
    """Raise UserError if `directory` holds anything: a new run never overwrites an old one."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"run.dir: {directory} exists; go on with --resume {directory}, remove it or name another")


def require_sinks(*, tensorboard: bool, wandb_project: str | None) -> None:
    """Raise UserError if a requested sink is not installed."""
    for key, wanted, package in (
        ("run.tensorboard", tensorboard, "tensorboard"),
        ("run.wandb", wandb_project is not None, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{key}: {package} is not installed; pip install 'cjepa-fast[{package}]', or leave it out")


class RunDirectory:
    """The records of a run, written by rank 0 alone.

    Args:
        directory: created with its parents; an existing one must be resumed.
        config_yaml: the resolved configuration, or None on resume.
        resume_step: on resume, the step of the loaded checkpoint; later lines of metrics are dropped, as the run writes
            them again.
        total_steps: for the progress bar and the time left.
        tensorboard, wandb_project: optional further sinks, see `require_sinks`.

    Raises UserError, on construction and later, if the folder cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config_yaml: str | None,
        resume_step: int,
        total_steps: int,
        tensorboard: bool = False,
        wandb_project: str | None = None,
    ) -> None:
        self.directory, self.total_steps = directory, total_steps
        self._since, self._first_step = time.monotonic(), resume_step
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._bar: Any = None
        if config_yaml is not None:
            refuse_existing(directory)
        with self._writing():
            if config_yaml is not None:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / CONFIG).write_text(config_yaml)
            text = "".join(json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= resume_step)
            if (directory / METRICS).is_file() and (directory / METRICS).read_text() != text:
                _replace(directory / METRICS, text)  # also drops a torn line, which would swallow the next one
            self._file = open(directory / METRICS, "a", buffering=1)  # noqa: SIM115 - open for the run's life
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory))
        if wandb_project is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb = wandb.init(project=wandb_project, dir=str(directory), name=directory.name)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=resume_step, unit="step", dynamic_ncols=True)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl so far, without a line torn by a crash."""
        lines = []
        if (self.directory / METRICS).is_file():
            for text in (self.directory / METRICS).read_text().splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    continue
        return lines

    def log(self, values: dict[str, Any], *, mfu: float | None = None) -> None:
        """Append one line of metrics, which must hold `step`, and show it.

        mfu: share of the GPU's peak rate, shown but not recorded; None if unknown.
        """
        with self._writing():
            self._file.write(json.dumps(values) + "\n")
        shown = {name: format(values[name], spec) for name, spec in COLUMNS.items() if values.get(name) is not None}
        step = values["step"]
        if mfu is not None:
            shown["of peak"] = f"{mfu:.0%}"
        shown["left"] = self._time_left(step)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(shown)
        else:
            pairs = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{self.total_steps}  {pairs}", flush=True)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def state(self, status: str, step: int, **more: Any) -> None:
        """Replace run_state.json, atomically."""
        with self._writing():
            _replace(self.directory / STATE, json.dumps({"status": status, "step": step, **more}, indent=1) + "\n")

    def _time_left(self, step: int) -> str:
        """Estimate the rest of the run from its rate so far, probes and checkpoints included: `"1:05:00"`."""
        seconds = (time.monotonic() - self._since) / (step - self._first_step) * (self.total_steps - step)
        return str(timedelta(seconds=round(seconds)))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run.dir: {self.directory} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Flush every sink."""
        self._file.close()
        for sink in (self._tensorboard, self._bar):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
