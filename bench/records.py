"""The stamp on every record of a benchmark (machine, versions, commit), and the files that records go to."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


@functools.cache
def environment(device: str) -> Row:
    """Return everything that a figure depends on besides the options of the command; `device` is "cuda" or "cpu"."""
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": nvidia_smi("driver_version"),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": os.environ.get("BENCH_COMMIT") or _commit(),
        "sources": _source_hash(),
    }


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def nvidia_smi(fields: str) -> str | None:
    """Return nvidia-smi's answer to a query about the first GPU; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def write(path: Path, text: str) -> None:
    """Replace a file in one step: a reader never sees half of the text."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def append(path: Path | None, row: Row) -> None:
    """Append a row to a JSONL file; do nothing without a path."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """Read the whole lines of a JSONL file, if it exists; a killed process may leave a torn last line."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def table(columns: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table.

    Columns are separated by "|"; ">" aligns one to the right. A row with too few cells is filled up before its last.
    """
    names = columns.split("|")
    lines = [[name.lstrip(">") for name in names], ["--:" if name.startswith(">") else "---" for name in names]]
    for row in rows:
        cells = [cell.replace("|", "/").replace("\n", " ") for cell in row]
        lines.append([*cells[:-1], *[""] * (len(names) - len(cells)), *cells[-1:]])
    return [f"| {' | '.join(line)} |" for line in lines]


def problem(row: Row) -> str:
    """Return the status of a row, and its reason if there is one."""
    return f"{row['status']}: {row['reason']}" if row.get("reason") else row["status"]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def _version(module: str) -> str | None:
    try:
        return importlib.import_module(module).__version__
    except ImportError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout, "+dirty" appended if files differ from it; None without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _source_hash() -> str:
    """Return a hash of the sources, which identifies the timed code without a commit, or beside a dirty one."""
    digest = hashlib.sha256()
    for folder, pattern in (("kernels", "*.py"), ("cjepa_fast", "**/*.py"), ("csrc", "**/*"), ("bench", "**/*.py")):
        for path in sorted(path for path in (ROOT / folder).glob(pattern) if path.is_file()):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
