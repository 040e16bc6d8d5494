"""The run directory: what a run was asked for, what it measured and how it ended.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cjepa_fast.errors import UserError

METRICS, STATE, CONFIG, CHECKPOINTS, INDEX = "metrics.jsonl", "run_state.json", "config.yaml", "checkpoints", "index"
COLUMNS = {
    "epoch": ".2f", "loss": ".4f", "feature_std": ".3f", "rankme": ".1f", "cosine_gap": ".3f", "knn_top1": ".1%",
    "images_per_s": ",.0f", "data_wait_ms": ".2f",
}  # fmt: skip


def refuse_existing(directory: Path) -> None:
    """Raises UserError if `directory` holds anything: a new run never writes over an old one."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"run.dir: {directory} exists; go on with --resume {directory}, remove it or name another")


def require_sinks(*, tensorboard: bool, wandb_project: str | None) -> None:
    """Raises UserError if a sink that is asked for is not installed."""
    for key, wanted, package in (
        ("run.tensorboard", tensorboard, "tensorboard"),
        ("run.wandb", wandb_project is not None, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{key}: {package} is not installed; pip install 'cjepa-fast[{package}]', or leave it out")


class RunDirectory:
    """Writes a run's records; made on rank 0 only.

    Args:
        directory: created with its parents; an existing one must be resumed.
        config_yaml: the resolved configuration, or None when resuming.
        resume_step: on resume, the step of the loaded checkpoint: later lines of metrics are dropped, for they are
            about to be written again.
        total_steps: for the progress bar.
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
                _replace(directory / METRICS, text)  # a torn line goes too: it would swallow the next one
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
        """The lines of metrics.jsonl so far; a line torn by a crash is left out."""
        lines = []
        if (self.directory / METRICS).is_file():
            for text in (self.directory / METRICS).read_text().splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    continue
        return lines

    def log(self, values: dict[str, Any]) -> None:
        """Appends one line of metrics (it must hold `step`) and shows it."""
        with self._writing():
            self._file.write(json.dumps(values) + "\n")
        shown = {name: format(values[name], spec) for name, spec in COLUMNS.items() if values.get(name) is not None}
        step = values["step"]
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
        """Prints a line without tearing the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def state(self, status: str, step: int, **more: Any) -> None:
        """Replaces run_state.json, atomically."""
        with self._writing():
            _replace(self.directory / STATE, json.dumps({"status": status, "step": step, **more}, indent=1) + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run.dir: {self.directory} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Flushes every sink."""
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
