"""The main job as a user runs it: records, exact resume, 2 processes, speed settings that change nothing, bad input."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cjepa_fast import train
from cjepa_fast.run.session import quiet_garbage_collector
from cjepa_fast.train import main
from runs import ROOT, SMALL, STEPS, metrics, run, tensors, torchrun, without_clocks


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "straight"
    run(images, out)
    return out


def test_records(straight: Path) -> None:
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    wanted = {"loss", "loss_prediction", "loss_sim", "loss_std", "loss_cov", "lr", "weight_decay", "ema"}
    wanted |= {"feature_std", "rankme", "cosine_gap", "images_per_s", "data_wait_ms", "epoch"}
    assert all(wanted <= line.keys() for line in lines) and "knn_top1" in lines[-1]
    weighted = 0.01 * (25 * lines[3]["loss_sim"] + 25 * lines[3]["loss_std"] + lines[3]["loss_cov"])
    assert lines[3]["loss"] == pytest.approx(lines[3]["loss_prediction"] + weighted, rel=1e-5)
    state = json.loads((straight / "run_state.json").read_text())
    assert state["status"] == "completed" and state["step"] == STEPS and 0 <= state["untrained"] <= 1
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["step-00000007", "step-00000012"]
    assert "vit_demo" in (straight / "config.yaml").read_text()


def test_resume_is_exact(straight: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000012")
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "torn')  # as a crash leaves it
    assert main(["--resume", str(resumed)]) == 0
    assert without_clocks(metrics(resumed)) == without_clocks(metrics(straight))
    ours = tensors(resumed / "checkpoints" / "step-00000012", tmp_path / "a.pt")
    theirs = tensors(straight / "checkpoints" / "step-00000012", tmp_path / "b.pt")
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_resume_refuses_another_model_and_a_run_without_checkpoints(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in straight.rglob("*"))
    assert main(["--resume", str(straight), "--model.encoder", "vit_pico"]) == 2
    assert "model.encoder: vit_demo -> vit_pico" in capsys.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in straight.rglob("*")) == before
    assert main(["--resume", str(straight)]) == 2
    assert "the run is complete, all of its 12 steps are done" in capsys.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(straight / "config.yaml", bare)
    assert main(["--resume", str(bare)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [2])
def test_processes_do_not_matter(images: Path, tmp_path: Path, processes: int) -> None:
    more = ["--optim.steps", "20", "--run.checkpoint-every", "11"]
    alone = run(images, tmp_path / "alone", *more)
    arguments = [*SMALL, "--data.root", str(images), "--run.dir", str(tmp_path / "many"), *more]
    done = torchrun(processes, *arguments)
    assert done.returncode == 0, done.stderr
    together = metrics(tmp_path / "many")
    assert len(together) == len(alone) == 20
    for a, b in zip(alone, together, strict=True):
        for key in ("loss", "loss_prediction", "loss_sim", "loss_std"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), f"step {a['step']}: {key}"
        assert b["cosine_gap"] == pytest.approx(a["cosine_gap"], abs=0.2)  # other images stand for "another image"
    assert together[-1]["knn_top1"] == alone[-1]["knn_top1"]

    shutil.rmtree(tmp_path / "many" / "checkpoints" / "step-00000020")
    done = torchrun(processes, "--resume", str(tmp_path / "many"))
    assert done.returncode == 0, done.stderr
    again = without_clocks(metrics(tmp_path / "many"))
    assert again == without_clocks(together), "a resume on the same world size is exact"


def test_two_nodes_meet_and_one_goes_on(images: Path, straight: Path, tmp_path: Path) -> None:
    """The rendezvous of docs/cluster.md, both nodes on this machine; then a resume on one node."""
    out = tmp_path / "run"
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "17",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost",
        "-m", "cjepa_fast.train", *SMALL, "--data.root", str(images), "--run.dir", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nodes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    try:
        printed = [node.communicate(timeout=100)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert "state not sharded, 2 copies (auto)" in "".join(printed)  # one process a node
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    together = metrics(out)
    assert main(["--resume", str(out)]) == 0
    assert metrics(out)[:7] == together[:7]
    for a, b, c in zip(metrics(straight), together, metrics(out), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), f"step {a['step']}"
        assert c["loss"] == pytest.approx(a["loss"], rel=1e-5), f"step {a['step']}"


@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        (["--runtime.data-threads", "3"], 0),
        (["--runtime.accumulate", "2"], 1e-5),
        (["--runtime.cpu-threads", "2"], 1e-5),
        (["--runtime.kernels", "eager"], 1e-5),
        (["--runtime.masks", "numpy"], 0),
        pytest.param(
            ["--runtime.kernels", "triton"],
            1e-5,
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"),
        ),
        (["--runtime.memory", "recompute"], 0),
        (["--runtime.memory", "auto:0.001"], 0),
        (["--runtime.compile", "static"], 1e-5),
        (["--runtime.compile", "dynamic"], 1e-5),
        (["--runtime.attention", "eager"], 1e-5),
        pytest.param(
            ["--runtime.attention", "triton"],
            1e-5,
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_speed_settings_change_nothing(
    images: Path, straight: Path, tmp_path: Path, setting: Sequence[str], tolerance: float
) -> None:
    slow = {"triton", "--runtime.compile"} & set(setting)
    # a predictor of 4 heads of 24, which the attention kernel takes
    steps = ["--optim.steps", "2", "--model.predictor-width", "96"] if slow else []
    if "--runtime.compile" in setting:  # one block size: every further one costs the C++ compiler seconds
        steps += [
            "--mask.target-scale",
            "0.2",
            "0.2",
            "--mask.target-aspect",
            "1",
            "1",
            "--mask.context-scale",
            "1",
            "1",
        ]
    threads = torch.get_num_threads()
    try:
        ours = run(images, tmp_path / "run", *setting, *steps)
    finally:
        torch.set_num_threads(threads)
    theirs = run(images, tmp_path / "plain", *steps) if steps else metrics(straight)
    for a, b in zip(theirs, ours, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance, abs=0), f"step {a['step']}"


def test_after_an_error_no_group_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    destroyed: list[bool] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: destroyed.append(True))

    def fails(*arguments: Any) -> int:
        with quiet_garbage_collector():
            assert not gc.isenabled()
            raise RuntimeError("out of memory")

    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        main([])
    assert not destroyed and gc.isenabled()
    monkeypatch.setattr(train, "train", lambda *arguments: 0)
    assert main([]) == 0 and destroyed == [True]


@pytest.mark.parametrize("bad", [False, True])
def test_nothing_is_written_but_the_cache_and_the_run(images: Path, tmp_path: Path, bad: bool) -> None:
    """A process whose home, working folder and temporary folder are watched, beside its images; also if it fails."""
    places = {name: tmp_path / name for name in ("home", "work", "temporary", "data", "cache")}
    for name in ("home", "work", "temporary"):
        places[name].mkdir()
    shutil.copytree(images, places["data"])
    for path in (places["data"] / "cat").iterdir() if bad else ():  # a quick index does not see it, training does
        path.write_bytes(path.read_bytes()[: -(path.stat().st_size // 4)])
    variables = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    variables |= {
        "HOME": str(places["home"]), "TMPDIR": str(places["temporary"]), "CJEPA_CACHE": str(places["cache"]),
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def stamps(root: Path) -> dict[str, tuple[int, int]]:
        return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*"))}

    before, checkout = stamps(tmp_path), stamps(ROOT / "cjepa_fast")
    done = subprocess.run(
        [sys.executable, "-m", "cjepa_fast.train", *SMALL, "--optim.steps", "2", "--data.root", str(places["data"]),
         "--run.dir", "run"],
        cwd=places["work"], env=variables, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == (2 if bad else 0), done.stderr
    after = stamps(tmp_path)
    new = {name for name in after if after[name] != before.get(name)}
    assert "cache/manifests" in new and set(before) <= set(after)
    assert ("work/run/metrics.jsonl" in new) is not bad
    outside = {name for name in new if not name.startswith(("cache", "work/run"))}
    # torch makes an empty folder for its compiler when it is imported
    assert all(name in ("work", "temporary") or name.startswith("temporary/torchinductor_") for name in outside), (
        outside
    )
    assert not [path for path in places["temporary"].rglob("*") if path.is_file()]
    assert stamps(ROOT / "cjepa_fast") == checkout


def test_check_prints_and_leaves(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*SMALL, "--data.root", str(images), "--run.dir", str(out), "--check"]) == 0
    printed = capsys.readouterr().out
    for text in ("batch_size: 8", "40 images in 2 class folders", "GFLOP", "parameters", "memory"):
        assert text in printed, text
    assert not out.exists()


def broken(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("how", ["plain", "check"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "--optim.lr"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--preset", "demoo"], "demo"),
        (["--model.patch-size", "5"], "model.image_size: 24"),
        (["--data.root", "{tmp}/none"], "none"),
        (["--data.root", "{tmp}/empty"], "empty"),
        (["--data.root", "{tmp}/text"], "fake.jpg"),
        (["--data.root", "{tmp}/text/fake.jpg"], "fake.jpg"),
        (["--optim.batch-size", "400"], "400"),
        (["--optim.warmup-epochs", "9"], "warm"),
        (["--run.dir", "{tmp}/text"], "--resume"),
        (["--data.probe-root", "{tmp}/other"], "has 2 classes (x, y), data.root has 2 classes (cat, dog)"),
        (["--data.probe-root", "{tmp}/other/x"], "data.probe_root: has no labels, data.root has 2 classes"),
        (["--config", "{tmp}/typo.yaml"], "optim.lr"),
        (["--resume", "{tmp}/empty"], "config.yaml"),
        (["--mask.min-keep", "30"], "mask.min_keep: 30"),
        (["--optim.epochs", "1e308", "--optim.steps", "None"], "optim.epochs: makes a run of inf steps"),
        (["--optim.steps", "1000000000000"], "optim.steps: makes a run of 1e+12 steps"),
        (["--optim.warmup-epochs", "1e308", "--optim.steps", "5"], "optim.warmup_epochs"),
        (["--run.dir", "{tmp}/run", "lr", "3"], "--run.dir: expected a path or None, got"),
        (["--runtime.kernels", "triton"], "runtime.kernels: triton cannot run"),
        (
            ["--runtime.attention", "sdpa", "--runtime.compile", "static"],  # unions of targets are packed
            "runtime.attention: sdpa cannot run: packed sequences would have to be padded; use auto",
        ),
        pytest.param(
            ["--runtime.masks", "cuda"], "runtime.masks: cuda is not available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to sample on"),
        ),
        (["--run.wandb", "project"], "cjepa-fast[wandb]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a user's shell is
    monkeypatch.setitem(sys.modules, "wandb", None)  # missing, whatever is installed here
    (tmp_path / "empty").mkdir()
    broken(tmp_path / "text", "fake.jpg", b"<html>not an image</html>")
    for label in ("x", "y"):
        shutil.copytree(images / "cat", tmp_path / "other" / label)
    (tmp_path / "typo.yaml").write_text("optim:\n  lrr: 1e-4\n")
    before = sorted(tmp_path.rglob("*"))
    base = [] if "--resume" in arguments else [*SMALL, "--data.root", str(images), "--run.dir", str(tmp_path / "run")]
    more = [argument.format(tmp=tmp_path) for argument in arguments]
    assert main([*base, *more, *(["--check"] if how == "check" else [])]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and message in captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_world_that_does_not_divide_the_batch(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting in ("RANK=0", "WORLD_SIZE=3", "LOCAL_RANK=0", "MASTER_ADDR=localhost", "MASTER_PORT=1"):
        monkeypatch.setenv(*setting.split("="))
    assert main([*SMALL, "--data.root", str(images)]) == 2
    error = capsys.readouterr().err
    assert "8" in error and "3" in error and error.count("\n") == 1
