"""The run directory: what a resumed run finds of its metrics, and a disk that takes no more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cjepa_fast.errors import UserError
from cjepa_fast.run.records import RunDirectory


def opened(folder: Path, *, resume_step: int | None) -> RunDirectory:
    config = "seed: 0\n" if resume_step is None else None
    return RunDirectory(folder, config_yaml=config, resume_step=resume_step or 0, total_steps=9)


@pytest.mark.parametrize("torn", ["", '{"step": 9, "lo', '{"step": 9, "loss": 1}'])
@pytest.mark.parametrize("resume_step", [6, 8])
def test_a_resumed_run_goes_on_behind_whole_lines(tmp_path: Path, torn: str, resume_step: int) -> None:
    """Whatever a crash left behind the checkpoint's line, every line of the resumed run can be read."""
    run = opened(tmp_path / "run", resume_step=None)
    for step in (3, 6, 8):
        run.log({"step": step, "loss": step / 7})
    run.close()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    run = opened(tmp_path / "run", resume_step=resume_step)
    run.log({"step": 9, "loss": 2.0})
    run.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    before = [{"step": step, "loss": step / 7} for step in (3, 6, 8) if step <= resume_step]
    assert lines == [*before, {"step": 9, "loss": 2.0}]


def test_a_disk_that_refuses_is_a_user_error(tmp_path: Path) -> None:
    says = f"run.dir: {re.escape(str(tmp_path))} cannot be written: "
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    run = opened(tmp_path, resume_step=3)
    with pytest.raises(UserError, match=says + "No space left on device"):
        run.log({"step": 4})
    (tmp_path / "run_state.json.tmp").mkdir()
    with pytest.raises(UserError, match=says + "Is a directory"):
        run.state("running", 4)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=says + "Is a directory"):
        opened(tmp_path, resume_step=3)
