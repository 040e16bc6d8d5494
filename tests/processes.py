"""Commands that tests start, ended with all of their descendants whatever becomes of the test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run(command: Sequence[str], *, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with changed environment variables and return its output.

    The command leads a process group. The group is killed when the command has ended, and also when this call is
    interrupted: a test's timeout raises here, and workers of the command would outlive a kill of the command alone.
    """
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
