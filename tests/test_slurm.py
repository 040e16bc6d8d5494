"""docs/slurm.sh among stand-ins for Slurm's commands: what it starts, what it continues, and when it asks for more."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "slurm.sh"
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node3\\nnode4\\n'; else echo "$@" >> requeued; fi
"""
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > started
mkdir -p "run dir"
echo '{"status": "STATUS", "step": 7}' > "run dir/run_state.json"
exit 1
"""


@pytest.mark.parametrize("status", ["preempted", "failed"])
def test_a_job_starts_continues_and_queues_again(tmp_path: Path, status: str) -> None:
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN.replace("STATUS", status))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "99", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_NUM_NODES": "2"}
    environment = {**os.environ, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def job() -> list[str]:
        command = ["bash", str(SCRIPT), "run dir", "--data.root", "a b"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, "")
        return (tmp_path / "started").read_text().splitlines()

    started = job()
    assert started[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "gpu"]
    assert started[5:11] == ["--rdzv-id", "99-0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node3:29500"]
    assert "SIGUSR1" in started[started.index("--signals-to-handle") + 1]
    assert started[-6:] == ["-m", "cjepa_fast.train", "--run.dir", "run dir", "--data.root", "a b"]
    requeues, expected = tmp_path / "requeued", "requeue 99\n" if status == "preempted" else ""
    assert (requeues.read_text() if requeues.exists() else "") == expected
    (tmp_path / "run dir" / "checkpoints" / "step-00000007").mkdir(parents=True)
    assert job()[-4:] == ["-m", "cjepa_fast.train", "--resume", "run dir"]
    # the stand-in for srun leaves the state as it was, as a job does that fails before its first step
    assert (requeues.read_text() if requeues.exists() else "") == expected
