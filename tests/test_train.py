"""The main job as a user runs it: records, exact resume, 2 processes, speed settings that change nothing, bad input."""

from __future__ import annotations

import functools
import gc
import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from cjepa_fast import config, train
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.engine.build import MaskFeed, build_sampler, compile_blocks
from cjepa_fast.engine.step import forward_backward
from cjepa_fast.feed.order import epoch_order
from cjepa_fast.masks import Masks
from cjepa_fast.methods import Method, build_method
from cjepa_fast.run import checkpoint
from cjepa_fast.run.session import quiet_garbage_collector
from cjepa_fast.run.signals import InterruptFlag
from cjepa_fast.train import main
from runs import metrics, without_clocks, write_images

STEPS = 12
SMALL = (
    "--model.encoder vit_demo --model.image-size 24 --model.patch-size 4 --model.predictor-depth 1 "
    "--model.predictor-width 48 --model.precision fp32 --mask.target-scale 0.15 0.2 --mask.min-keep 3 "
    "--mask.context-keep None --loss.vicreg-weight 0.01 "
    f"--optim.batch-size 8 --optim.steps {STEPS} --optim.warmup-epochs 0.2 --run.log-every 1 --run.checkpoint-every 7 "
    "--runtime.data-threads 1 --runtime.device cpu"
).split()  # fmt: skip
TWO_STEPS = ("--optim.steps", "2", "--optim.warmup-epochs", "0")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def images(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"), 20, ("cat", "dog"))


def run(images: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    assert main([*SMALL, "--data.root", str(images), "--run.dir", str(out), *more]) == 0
    return metrics(out)


def tensors(step: Path, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(step, scratch)
    return torch.load(scratch)


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, "-m", "cjepa_fast.train", *arguments], capture_output=True, text=True, env=environment, timeout=200
    )  # fmt: skip


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
    low = ["--model.precision", "bf16"] if "bf16" in setting else []
    slow = {"bf16", "triton", "--runtime.compile"} & set(setting)
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
    theirs = run(images, tmp_path / "plain", *steps, *low) if steps else metrics(straight)
    for a, b in zip(theirs, ours, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance, abs=0), f"step {a['step']}"


@pytest.mark.parametrize(
    ("compiled", "device", "shorter"),
    [("auto", "cpu", True), ("static", "cpu", False), ("dynamic", "cpu", True), ("auto", "meta", False)],
)
def test_padding_is_left_where_it_keeps_shapes_few(
    compiled: str, device: str, shorter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config.replace(PRESETS["demo"], {"mask.mode": "packed", "mask.context_keep": None, "runtime.compile": compiled})
    feed = MaskFeed(c, build_method(c), torch.device("cpu"))
    if device == "meta":  # stands for a GPU, to which no copy is pinned here
        monkeypatch.setattr(Masks, "to", lambda masks, _: masks)
        feed = MaskFeed(c, build_method(c), torch.device(device))
    assert feed.sampler is not None
    (masks,), drawn = feed(0, range(8)), feed.sampler.sample(0, range(8), union=True)
    assert masks is not None and (len(masks.context) < len(drawn.context)) == shorter


def test_the_compiler_takes_the_shapes_of_all_presets() -> None:
    """Each block size has a shape of its own in the context encoder, in the predictor's first, last and other blocks,
    and where the target encoder computes unions; all rows of the target encoder, and of its last block, add two.
    """
    limits = torch._dynamo.config
    with limits.patch(recompile_limit=8, accumulated_recompile_limit=256):  # put back, also where it is changed within
        assert compile_blocks(Method(), "static", torch.device("cpu"), "fixed") == "compiled for each shape"
        least = min(limits.recompile_limit, limits.accumulated_recompile_limit)
    for name, preset in PRESETS.items():
        if preset.method == "vicreg":
            continue  # one shape
        for mode in ("fixed", "packed"):
            sampler = build_sampler(config.replace(preset, {"mask.mode": mode, "mask.context_keep": None}))
            sizes = {sampler.block_sizes(step) for step in range(2000)}
            assert 5 * len(sizes) + 2 <= least, (name, mode)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("packed", "compiled for all shapes at once (auto: packed masks)"),
        ("faithful", "compiled for all shapes at once (auto: faithful masks)"),
        ("fixed", "compiled for each shape (auto: fixed masks)"),
    ],
)
def test_programs_of_a_run(mode: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What auto would have on a GPU, and how often dynamo compiles for dynamic shapes: not once a block size."""
    preset = {
        "model.encoder": "vit_demo", "model.predictor_width": 48,
        "model.predictor_depth": 3, "model.precision": "fp32", "mask.mode": mode, "mask.context_keep": None,
    }  # fmt: skip
    c = config.replace(PRESETS["cjepa_vit_small16_in1k"], preset)
    method = build_method(c)
    feed = MaskFeed(c, method, torch.device("cpu"))
    sampler = feed.sampler
    assert sampler is not None
    compile_module, chosen = torch.nn.Module.compile, []

    def compile_quickly(self: torch.nn.Module, *, dynamic: bool) -> None:
        chosen.append(dynamic)
        compile_module(self, dynamic=True, backend="aot_eager")  # as Inductor does, but for the machine code

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    assert compile_blocks(method, "auto", torch.device("cuda"), mode) == said
    assert len(chosen) == 9 and set(chosen) == {mode != "fixed"}
    torch._dynamo.reset()
    programs = torch._dynamo.utils.counters["stats"]
    before, images = programs["unique_graphs"], torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    steps = {sampler.block_sizes(step): step for step in reversed(range(60))}
    for step in list(steps.values())[:8]:
        forward_backward(method, images, sampler.sample_parts(step, range(2), 1, union=True))
    assert 5 <= programs["unique_graphs"] - before <= 9


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


def as_tar(images: Path, folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as shard:
        for i, path in enumerate(sorted(images.glob("*/*.jpg"))):
            shard.add(path, f"{i:03d}.jpg")
            label = tarfile.TarInfo(f"{i:03d}.cls")
            label.size = 1
            shard.addfile(label, io.BytesIO(b"0" if path.parent.name == "cat" else b"1"))
    return folder


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


def as_flat_folder(images: Path, folder: Path) -> list[str]:
    folder.mkdir()
    for i, path in enumerate(sorted(images.glob("*/*.jpg"))):
        shutil.copy(path, folder / f"{i:03d}.jpg")
    return [str(folder)]


def as_parquet(images: Path, folder: Path) -> list[str]:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: parquet is not tested")
    paths = sorted(images.glob("*/*.jpg"))
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [int(path.parent.name == "dog") for path in paths],
    }
    folder.mkdir()
    importlib.import_module("pyarrow.parquet").write_table(
        pyarrow.table(rows), folder / "train-0.parquet", row_group_size=7
    )
    return [str(folder / "train-*.parquet")]


def as_list(images: Path, folder: Path, ending: str) -> list[str]:
    """With labels, of paths relative to it."""
    folder.mkdir()
    lines = ["path,label"] if ending == "csv" else []
    for path in sorted(images.glob("*/*.jpg")):
        relative = os.path.relpath(path, folder)
        lines.append(f"{relative},{path.parent.name}" if ending == "csv" else f"{relative}\t{path.parent.name}")
    (folder / f"train.{ending}").write_text("\n".join(lines) + "\n")
    return [str(folder / f"train.{ending}")]


KINDS = {
    "flat folder": (as_flat_folder, "40 images in 1 folder, no labels"),
    "tar shards": (lambda images, folder: [str(as_tar(images, folder))], "40 images in 1 tar shard, 2 labels"),
    "parquet": (as_parquet, "40 images in 1 parquet file, 2 labels"),
    "text list": (functools.partial(as_list, ending="txt"), "40 images in a list of 40 paths, 2 labels"),
    "CSV list": (functools.partial(as_list, ending="csv"), "40 images in a list of 40 paths, 2 labels"),
    "mixture": (
        lambda images, _: [f"{images / 'cat'}=1", f"{images / 'dog'}=1"],
        "20 images in 1 folder, no labels, weight 1; 20 images in 1 folder, no labels, weight 1",
    ),
}


@pytest.fixture(scope="module")
def two_steps(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return without_clocks(run(images, tmp_path_factory.mktemp("runs") / "two", *TWO_STEPS))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_trains_as_class_folders_do(
    images: Path, two_steps: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The same images in the same order: every figure of every step is equal, and so is the probe's, given labels."""
    lay_out, found = KINDS[kind]
    roots = lay_out(images, tmp_path / "data")
    assert main([*SMALL, "--run.dir", str(tmp_path / "run"), *TWO_STEPS, "--data.root", *roots]) == 0
    printed = capsys.readouterr().out
    assert f"data: {' '.join(roots)}: {found}\n" in printed
    expected = two_steps
    if "no labels" in found:
        assert "no labels, so no 20-NN probe" in printed
        expected = [{name: x for name, x in line.items() if name != "knn_top1"} for line in two_steps]
    assert without_clocks(metrics(tmp_path / "run")) == expected


def test_roots_are_mixed_and_resume_knows_them(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = as_tar(images, tmp_path / "shards"), tmp_path / "run"
    roots = [f"{shards}=2", f"{images / 'cat'}=0.5"]  # 80 and 10 visits: 11 steps of 8 an epoch
    arguments = [*SMALL, "--run.dir", str(out), "--optim.steps", "14", "--data.root", *roots]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "weight 2; 20 images in 1 folder, no labels, weight 0.5" in printed
    assert "11 steps an epoch (2 of its 90 images left over, others each time), 14 steps in all" in printed
    assert "no labels, so no 20-NN probe" in printed
    lines = without_clocks(metrics(out))

    shutil.rmtree(out / "checkpoints" / "step-00000014")
    assert main(["--resume", str(out), "--data.root", roots[0], f"{images / 'cat'}=0.6"]) == 2
    assert "the run began with other weights or images; restore them" in capsys.readouterr().err
    assert main(["--resume", str(out), "--data.root", f"{images}=2", roots[1]]) == 2
    assert f"{images}: is a folder, the run began with a tar" in capsys.readouterr().err
    kept = (out / "index" / "1").read_bytes()
    (out / "index" / "1").write_bytes(kept[:-9])
    assert main(["--resume", str(out)]) == 2
    assert (
        f"{out / 'index' / '1'}: the run's index of {images / 'cat'} is damaged; restore it" in capsys.readouterr().err
    )
    (out / "index" / "1").write_bytes(kept)
    shards.rename(tmp_path / "moved")
    assert main(["--resume", str(out), "--data.root", f"{tmp_path / 'moved'}=2", roots[1]]) == 0
    assert without_clocks(metrics(out)) == lines


def spoil(image: Path) -> None:
    """In place and of the same length, so that no index notices."""
    image.write_bytes(b"<html>" + image.read_bytes()[6:])


def test_a_bad_image_ends_the_run_or_is_skipped(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flat, out = tmp_path / "flat", tmp_path / "run"
    shutil.copytree(images / "cat", flat)
    arguments = [*SMALL, "--data.root", str(flat), "--run.checkpoint-every", "3"]
    assert main([*arguments, "--check"]) == 0
    victim = flat / "7.jpg"
    spoil(victim)
    assert main([*arguments, "--run.dir", str(tmp_path / "strict")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {victim}: starts with b'<html>JF'") and error.count("\n") == 1
    assert "data.on_error skip" in error

    caplog.clear()
    lines = run(flat, out, *arguments[-2:], "--data.on-error", "skip")
    assert f"skipped from now on: {victim}" in caplog.text
    assert [line["skipped_images"] for line in lines][-9:] == [1] * 9  # met within the first epoch, of 2 steps
    assert json.loads((out / "run_state.json").read_text())["skipped_images"] == 1
    ours = tensors(out / "checkpoints" / "step-00000012", tmp_path / "a.pt")
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    victim.unlink()  # which changes the folder: the run goes on with its own index
    caplog.clear()
    assert main(["--resume", str(out)]) == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # it is not met again
    assert without_clocks(metrics(out)) == without_clocks(lines)
    again = tensors(out / "checkpoints" / "step-00000012", tmp_path / "b.pt")
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_processes_skip_the_same_images(images: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    more = ["--data.root", str(data), "--data.on-error", "skip"]
    assert main([*SMALL, *more, "--check"]) == 0
    spoil(sorted(data.glob("*/*.jpg"))[epoch_order(40, seed=0, epoch=0)[13]])  # in step 1, and the second rank's
    alone = run(data, tmp_path / "alone", *more)
    done = torchrun(2, *SMALL, *more, "--run.dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    together = metrics(tmp_path / "two")
    for a, b in zip(alone, together, strict=True):
        assert a["skipped_images"] == b["skipped_images"] == (a["step"] > 1)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert together[-1]["knn_top1"] == alone[-1]["knn_top1"]


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
