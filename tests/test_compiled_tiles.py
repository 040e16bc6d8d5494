"""Every shipped tile of every kernel, compiled for Ampere, Hopper and Blackwell without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import processes

ROOT = Path(__file__).parents[1]
MULTIPLIES = {"attention", "variance_covariance"}  # kernels with matrix products


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("report") / "tiles.jsonl"
    # another process, as this one may interpret kernels
    command = [sys.executable, "-m", "bench.compile_report", "--json", str(path)]
    done = processes.run(command, cwd=ROOT, TRITON_INTERPRET="0")
    return done, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four minutes of a CPU where nothing is cached
def test_shipped_tiles_compile_without_spills(report: Any) -> None:
    done, rows = report
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAILED" in line) + done.stderr
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_")}
    for arch in (80, 90, 100):
        assert {row["kernel"] for row in rows if row["sm"] == arch} >= kernels


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_products_of_16_bits_use_tensor_cores(report: Any) -> None:
    rows = [row for row in report[1] if row["kernel"] in MULTIPLIES and "bf16" in row["tile"]]
    for arch, instruction in ((80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")):
        for kernel in MULTIPLIES:
            used = [row["matrix"] for row in rows if row["kernel"] == kernel and row["sm"] == arch]
            assert any(instruction in matrix for matrix in used), (arch, kernel, used)
