"""The benchmarks' promises, tried on a small checkout of made-up operations and kernels, on the CPU."""

from __future__ import annotations

import graphlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import processes
from bench import curves, gpu, plots
from bench.feed import command as data
from bench.feed import index, report, waits
from bench.feed.images import lay_out, synthetic_jpegs
from cjepa_fast.errors import UserError
from cjepa_fast.feed.manifest import Manifest
from test_imports import imports, within

ROOT = Path(__file__).parents[1]

# two rivals of 4 and 8 ms, ours of 2 ms; a million bytes and a hundred million FLOP a call
NAPS = """
import time
from bench.ops.cases import Case, Variant

def nap(milliseconds, factor=2.0):
    def call(x):
        time.sleep(milliseconds / 1e3)
        return factor * x
    return call

def refuse(x):
    raise RuntimeError("head width 24 is not supported\\nsecond line")

def cases(device, dtype, quick):
    import torch
    variants = [
        Variant(name="fused", call=nap(2, OURS), role="ours"),
        Variant(name="eager", call=nap(4)),
        Variant(name="slow", call=nap(8)),
        Variant(name="half", call=nap(1), role="yardstick", compared=None),
        Variant(name="absent", call=None, obstacle="not installed"),
        Variant(name="refuses", call=refuse),
        Variant(name="cheats", call=nap(0, 2.1)),
    ]
    yield Case(name="n=5", direction="fwd", inputs=lambda: (None, torch.arange(1.0, 6.0))[1:], variants=variants,
               bytes=10**6, flop=10**8, items=64, item="images", truth=lambda x: 2.0 * x)
"""

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)

@triton.jit
def multiply(x, out, WIDE: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + o)
    if WIDE:
        tl.store(out + o, product(a.to(tl.float32), a.to(tl.float32), "ieee"))
    else:
        tl.store(out + o, product(a, a, "ieee"))

@triton.jit
def accumulate(x, out, n, N: tl.constexpr, STAGES: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.zeros([N, N], dtype=tl.float32)
    for i in tl.range(0, n, num_stages=STAGES):
        total = tl.dot(tl.load(x + i * N * N + o), tl.load(x + (i + 1) * N * N + o), total)
    tl.store(out + o, total)

@triton.jit
def normalise(x, out, N: tl.constexpr):
    o = tl.arange(0, N)
    a = tl.load(x + o)
    tl.store(out + o, a / tl.sum(a, 0))

@triton.jit
def broken(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), missing)

def tile(name, kernel, constants, signature):
    return dict(name=name, kernel=kernel, constants=constants, signature=signature)

HALF, WHOLE = {"x": "*bf16:16", "out": "*fp32:16"}, {"x": "*fp32:16", "out": "*fp32:16"}
GOOD = tile("good", multiply, dict(WIDE=False, N=64, num_warps=4, num_stages=2), HALF)
BAD = [
    tile("no tensor core", multiply, dict(WIDE=True, N=32, num_warps=4), HALF),
    tile("too much shared", accumulate, dict(N=128, STAGES=5, num_warps=8), {**HALF, "n": "i32"}),
    tile("spills", normalise, dict(N=16384, num_warps=1), WHOLE),
    tile("does not compile", broken, dict(N=64, num_warps=1), {"x": "*fp32:16"}),
]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of the real bench/ and cjepa_fast/ whose operations, kernels and tests are made up."""
    for folder in ("bench/ops/cases", "bench/feed", "cjepa_fast", "kernels", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    rooms = ("bench", "bench/ops", "bench/feed", "cjepa_fast")
    files = [path for room in rooms for path in (ROOT / room).glob("*.py")]
    for path in [ROOT / "bench/ops/cases/__init__.py", *files]:
        (tmp_path / path.relative_to(ROOT)).symlink_to(path)
    (tmp_path / "bench/step").symlink_to(ROOT / "bench/step")
    for room in (path.parent for path in (ROOT / "cjepa_fast").glob("*/__init__.py")):
        (tmp_path / "cjepa_fast" / room.name).symlink_to(room)
    (tmp_path / "cjepa_fast/kernels").symlink_to("../kernels")
    (tmp_path / "kernels/bad.py").write_text(KERNELS + "AOT = BAD\n")
    (tmp_path / "kernels/good.py").write_text(KERNELS + "AOT = [GOOD]\n")
    for name, ours, passes in (("fused", 2.0, True), ("red", 2.0, False), ("wrong", 2.2, True)):
        (tmp_path / f"bench/ops/cases/{name}.py").write_text(NAPS.replace("OURS", str(ours)))
        (tmp_path / f"tests/test_{name}.py").write_text(f"def test_it():\n    assert {passes}\n")
    return tmp_path


def run(checkout: Path, module: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH may name the real checkout, whose operations and kernels would be found first
    environment = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return processes.run([sys.executable, "-m", module, *arguments], cwd=checkout, **{**environment, **variables})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_says_what_was_measured_and_how(checkout: Path) -> None:
    out = checkout / "rows.jsonl"
    done = run(checkout, "bench.run", "fused", "--quick", "--json", str(out), "--markdown", str(checkout / "table.md"))
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in read(out)}
    assert list(rows) == ["copy", "matmul", "fused", "eager", "slow", "half", "absent", "refuses", "cheats"]
    stamp = {"op", "device", "dtype", "quick", "gpu", "cpu", "threads", "driver", "cuda", "torch", "triton", "python",
             "commit", "sources", "date", "gated", "rehearsal"}  # fmt: skip
    for row in rows.values():
        assert stamp <= set(row)
        assert (row["op"], row["dtype"], row["gated"], row["rehearsal"]) == ("fused", "fp32", True, False)

    for name, least_ms in (("fused", 2), ("eager", 4), ("slow", 8)):
        row = rows[name]
        assert least_ms <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"], row
        assert row["median_ms"] < 10 * least_ms, "not even a busy machine sleeps that much longer"
        assert row["gb_s"] == pytest.approx(1e6 / row["median_ms"] * 1e-6)
        assert row["tflop_s"] == pytest.approx(1e8 / row["median_ms"] * 1e-9)
        assert row["items_per_s"] == pytest.approx(64 / row["median_ms"] * 1e3)
        floors = {"memory": 1e6 / rows["copy"]["gb_s"] * 1e-6, "matrix": 1e8 / rows["matmul"]["tflop_s"] * 1e-9}
        assert row["floor_ms"] == pytest.approx(max(floors.values())) == pytest.approx(floors[row["limit"]])
        assert row["percent_of_ceiling"] == pytest.approx(100 * max(floors.values()) / row["median_ms"])
        assert row["speedup_over_best_rival"] == pytest.approx(rows["eager"]["median_ms"] / row["median_ms"])
        assert row["time_over_yardstick"] == pytest.approx(row["median_ms"] / rows["half"]["median_ms"])
        assert row["samples"] >= 5 and row["method"] == "host" and row["error"] == 0
    assert "speedup_over_best_rival" not in rows["half"], "a yardstick is no rival"

    reasons = {name: (rows[name]["status"], rows[name]["reason"]) for name in ("absent", "refuses", "cheats")}
    assert reasons == {
        "absent": ("cannot run", "not installed"),
        "refuses": ("cannot run", "RuntimeError: head width 24 is not supported"),
        "cheats": ("wrong", "relative error 0.05"),
    }
    assert not any("median_ms" in rows[name] for name in reasons)
    table = (checkout / "table.md").read_text()
    assert "CPU only" in table and all(f"| {name} " in table for name in reasons) and "| **fused** |" in table


@pytest.mark.parametrize("name", ["red", "untested"])
def test_a_red_or_untested_operation_is_not_timed(checkout: Path, name: str) -> None:
    (checkout / "bench/ops/cases/untested.py").write_text(NAPS.replace("OURS", "2.0"))
    done = run(checkout, "bench.run", name, "--quick", "--json", str(checkout / "rows.jsonl"))
    assert done.returncode == 1 and f"{name}: its tests have not passed, so it is not timed" in done.stderr
    assert not (checkout / "rows.jsonl").exists()


def test_rows_without_the_gate_say_so_and_a_wrong_result_of_ours_is_an_error(checkout: Path) -> None:
    out, table = checkout / "rows.jsonl", checkout / "table.md"
    arguments = ["--quick", "--no-gate", "--json", str(out), "--markdown", str(table)]
    done = run(checkout, "bench.run", "red", "wrong", *arguments)
    assert done.returncode == 1, done.stderr
    rows = {(row["op"], row["variant"]): row for row in read(out)}
    assert not any(row["gated"] for row in rows.values()) and table.read_text().count("Not gated") == 2
    assert rows["red", "fused"]["status"] == "ok" and rows["wrong", "eager"]["status"] == "ok"
    assert rows["wrong", "fused"]["status"] == "wrong" and "median_ms" not in rows["wrong", "fused"]


def test_interpreted_kernels_are_never_timed(checkout: Path) -> None:
    done = run(checkout, "bench.run", "fused", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "the interpreter is never timed" in done.stderr


def test_compile_report_refuses_bad_tiles(checkout: Path) -> None:
    out = checkout / "tiles.jsonl"
    done = run(checkout, "bench.compile_report", "--arch", "90", "--jobs", "2", "--json", str(out))
    assert done.returncode == 1, done.stderr
    rows = {row["tile"]: row for row in read(out)}
    assert rows["good"]["failure"] is None
    assert (rows["good"]["matrix"], rows["good"]["stages"], rows["good"]["spills"]) == ("wgmma bf16", 2, 0)
    assert rows["no tensor core"]["failure"] == "multiplies 16-bit matrices without tensor cores"
    assert rows["too much shared"]["failure"] == "shared memory over the 227 KiB of sm_90"
    assert rows["spills"]["failure"] == "spills" and rows["spills"]["spills"] > 0
    assert "missing is not defined" in rows["does not compile"]["failure"]
    assert "good                 sm_90: 1 tiles" in done.stdout and "0 B spilled, 0 failed" in done.stdout


def test_compile_report_passes_good_tiles(checkout: Path) -> None:
    done = run(checkout, "bench.compile_report", "--arch", "80", "90", "--only", "good", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mma.sync bf16" in done.stdout and "wgmma bf16" in done.stdout
    assert run(checkout, "bench.compile_report", "--only", "ugly").returncode == 2


def test_gpu_run_without_a_gpu_is_refused_in_one_line(checkout: Path) -> None:
    done = run(checkout, "bench.gpu", "--out", "results")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no GPU" in done.stderr
    assert not (checkout / "results").exists()


def test_gpu_run_goes_on_after_failures_and_records_them(checkout: Path) -> None:
    """A rehearsal: one operation hangs after its first rows, and the next is red."""
    (checkout / "bench/ops/cases/hangs.py").write_text(
        NAPS.replace("OURS", "2.0").replace("None, torch", "time.sleep(600), torch")
    )
    (checkout / "tests/test_hangs.py").write_text("def test_it():\n    pass\n")
    out = checkout / "results"
    names = ["bench hangs", "bench red"]
    done = run(checkout, "bench.gpu", "--cpu-rehearsal", "--out", str(out), "--minutes", "0.5", "--only", *names)
    assert done.returncode == 1, done.stderr
    record = json.loads((out / "results.json").read_text())
    statuses = {section["name"]: section["status"] for section in record["sections"]}
    assert statuses == {"bench hangs": "out of time", "bench red": "failed"}
    rows = read(out / "bench.jsonl")
    assert [(row["op"], row["variant"], row["rehearsal"]) for row in rows] == [
        ("hangs", "copy", True), ("hangs", "matmul", True)
    ]  # fmt: skip
    report = (out / "results.md").read_text()
    assert report.startswith("# Rehearsal") and "| bench red | failed |" in report
    assert "so it is not timed" in (out / "log.txt").read_text()
    assert len(list(out.iterdir())) <= 8, "more would not all come back from a lent machine"
    again = run(checkout, "bench.gpu", "--cpu-rehearsal", "--out", str(out))
    assert again.returncode == 2 and "holds files already" in again.stderr


def test_attention_is_ranked_by_time_forward_and_backward() -> None:
    """Entries for the table of measurements: plain sequences on a GPU, by bucket, of the backends that ops offers."""

    def row(case: str, variant: str, milliseconds: float, **other: Any) -> dict[str, Any]:
        return {"op": "attention", "gpu": "H", "direction": "fwd+bwd", "case": case, "variant": variant,
                "median_ms": milliseconds, **other}  # fmt: skip

    point = "predictor B n=84 d=32 h=12 B=512"
    rows = [
        row(point, "sdpa", 0.3), row(point, "triton", 0.1), row(point, "xformers", 0.2),
        row(point, "torch.compile", 0.05), row(point, "eager", 0.01, direction="fwd"),
        row("packed " + point, "eager", 0.01), row(point, "eager", 0.01, gpu=None),
        row("target H n=256 d=80 h=16 B=128", "sdpa", 1.0),
    ]  # fmt: skip
    assert gpu.attention_table(rows) == [
        '"H": {',
        '    (96, 32): ("triton", "xformers", "sdpa",),  # 84 tokens: 100, 200, 300 us',
        '    (256, 80): ("sdpa",),  # 256 tokens: 1000 us',
        "},",
    ]


# bench.data with readers of our own: two that are right, some that do other work, and some that fail
READERS = """
def fake(change, nap, images, threads):
    import itertools, time
    dataset = datasets.Pillow(images)
    ids = torch.arange(8 * images.batch_size).view(8, -1) % len(dataset)
    batches = [torch.stack([dataset[int(i)] for i in row]) for row in ids]
    for batch in itertools.cycle(batches):
        time.sleep(nap)
        yield change(batch)

def spins(images, threads):
    import signal, time
    if (child := os.fork()) == 0:
        end = time.monotonic() + 30
        while time.monotonic() < end and os.getppid() != 1:
            pass
        os._exit(0)
    try:
        yield from fake(lambda batch: batch, 0.02, images, threads)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

def refuses(images, threads):
    raise OSError("no codec\\nsecond line")
    yield

def nearest(batch):
    coarse = torch.nn.functional.interpolate(batch, scale_factor=0.25, mode="area")
    return torch.nn.functional.interpolate(coarse, batch.shape[-2:])

CHANGES = {
    "bgr": lambda batch: batch.flip(1),
    "upside down": lambda batch: batch.flip(2),
    "black": lambda batch: 0 * batch,
    "not normalised": lambda batch: batch / 2,
    "always the same": lambda batch: batch[:8].repeat(2, 1, 1, 1),
    "blurred": nearest,
    "small": lambda batch: batch[..., ::2],
    "half a batch": lambda batch: batch[::2],
    "not a number": lambda batch: batch * float("nan"),
    "dies": lambda batch: os._exit(3),
    "hangs": lambda batch: __import__("time").sleep(1e4),
}

def readers(device, threads):
    def reader(name, change, nap=0.0, **more):
        return Reader(name=name, open=functools.partial(fake, change, nap), delivers=FLOAT, **more)
    mean, std = torch.from_numpy(datasets.MEAN), torch.from_numpy(datasets.STD)
    pixels = lambda batch: ((batch.permute(0, 2, 3, 1) * std + mean) * 255).byte()
    return [
        reader("ours", pixels, 0.02, role="ours"), reader("rival", lambda batch: batch, 0.04),
        Reader(name="spins", open=spins), reader("absent", None, needs=("nowhere.at_all",)),
        Reader(name="refuses", open=refuses), *(reader(name, change) for name, change in CHANGES.items()),
    ]
"""


@pytest.fixture
def with_readers(checkout: Path) -> Path:
    said = '"""Return the answer, or a string that says what went wrong."""'
    impatient = f'{said}\n        patience = 2.0 if self._arguments[2] == "hangs" else patience'
    for name, before, after in (("readers", "", READERS), ("serve", said, impatient)):
        path = checkout / f"bench/feed/{name}.py"
        text = path.read_text()
        assert before in text
        path.unlink()
        path.write_text(text.replace(before, after) if before else text + after)
    return checkout


def test_the_feed_and_its_rivals_are_timed_after_a_look_at_their_images(with_readers: Path) -> None:
    out, table = with_readers / "rows.jsonl", with_readers / "table.md"
    options = ["--quick", "--only", "cifar", "--threads", "2", "--json", str(out), "--markdown", str(table)]
    done = run(with_readers, "bench.data", *options, TMPDIR=str(with_readers))
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in read(out)}
    for row in rows.values():
        assert {"op", "device", "cpu", "torch", "commit", "sources", "date", "libraries", "workers"} <= set(row)
        assert (row["case"], row["images"]) == ("synthetic 32x32 at 32 px", "synthetic 32x32")
    for name, most in (("ours", 16 / 0.02), ("rival", 16 / 0.04), ("spins", 16 / 0.02)):
        row = rows[name]
        assert row["status"] == "ok" and row["rounds"] == 2, row
        assert most / 3 < row["images_per_s_p20"] <= row["images_per_s"] <= row["images_per_s_p80"] <= most
        for rate in ("images_per_s", "images_per_cpu_s"):
            best = max(rows["rival"][rate], rows["spins"][rate])
            assert row[f"{rate}_over_best_rival"] == pytest.approx(row[rate] / best)
    assert rows["spins"]["cores_used"] > 2 * rows["ours"]["cores_used"], "a child's time is counted"
    assert rows["spins"]["images_per_cpu_s"] < rows["rival"]["images_per_cpu_s"]
    reasons = {name: (row["status"], row["reason"]) for name, row in rows.items() if row["status"] != "ok"}
    expected = {
        "absent": ("cannot run", "not installed: nowhere.at_all"), "refuses": ("cannot run", "OSError: no codec"),
        "bgr": ("wrong", "red is "), "upside down": ("wrong", "top - bottom is "), "black": ("wrong", "red is "),
        "not normalised": ("wrong", " instead of "), "always the same": ("wrong", " images are different"),
        "blurred": ("wrong", "detail is "), "small": ("wrong", "batches of (16, 32, 16, 3) instead of (16, 32, 32, 3)"),
        "half a batch": ("wrong", "batches of (8, 32, 32, 3)"), "not a number": ("wrong", "red is nan"),
        "dies": ("cannot run", "its process died (exit code 3)"), "hangs": ("cannot run", "no answer for 2 s"),
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    for name, (status, reason) in expected.items():
        assert reasons[name][0] == status and reason in reasons[name][1], (name, reasons[name])
        assert "images_per_s" not in rows[name]
    text = table.read_text()
    assert "| **ours** |" in text and "cannot run: not installed: nowhere.at_all" in text and "Ceilings" not in text
    assert not list(with_readers.glob("bench-data-*")), "what was laid out is gone"


def test_the_index_is_timed_on_sound_images(tmp_path: Path) -> None:
    images = lay_out(synthetic_jpegs(48, 64, 8), tmp_path, name="made up", size=32, batch_size=4, shards=1)
    row = index.index_rates(images, entries=5000)
    assert row["indexed_images"] == 8 and row["entries"] == 5000 and row["indexed_per_cpu_s"] > 100
    assert row["file_mib"] == pytest.approx((images.folder / "manifest").stat().st_size / 2**20)
    assert 0 < row["load_s"] < 1 and 0 < row["load_mib"] < 50
    line = report.index_line({**row, "status": "ok", "images": "made up"})
    assert "of made up images a second and core (thorough); a manifest of 5,000 entries" in line
    (images.files / "all" / "000003.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="1 sound images were left out"):
        index.index_rates(images, entries=10)


def test_a_million_entries(tmp_path: Path) -> None:
    """Less than 100 MB on disk and 200 in memory, and at hand in under a second of one core."""
    n = 10**6
    large = index.made_up_manifest(n)
    large.save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < 100e6
    again = Manifest.load(tmp_path / "m")
    assert again.path(n - 1) == f"/r/n{(n - 1) % 1000:08d}/n01440764_{n - 1}.JPEG"
    assert again.sizes.shape == (n, 2) and again.labels is not None
    seconds, mib = index.opening(tmp_path / "m")
    assert seconds < 1 and mib < 200


def test_what_is_made_of_waits() -> None:
    fed = [(0.0, 100.0)] * 17 + [(2.0, 100.0), (0.5, 10.0), (50.0, 150.0)]
    figures = waits.figures(fed, [90.0, 95.0, 99.0])
    assert figures.pop("wait_ms_p95") == pytest.approx(4.4)
    assert figures.pop("share_waited") == pytest.approx(52.5 / 1960)
    assert figures == {
        "steps": 20, "step_ms": 100.0, "step_ms_without_feed": 95.0, "wait_ms_median": 0.0, "wait_ms_max": 50.0,
        "steps_over_1_ms": 0.1, "steps_over_1_percent": 0.15,
    }  # fmt: skip
    batches: Any = iter(range(9))
    timed = waits.timed_steps(lambda batch: time.sleep(0.02), batches, 3)
    assert next(batches) == 3 and all(waited < 20 <= whole for waited, whole in timed)


def test_bad_input_of_the_feeds_benchmark_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CJEPA_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "")  # so that what the command sets does not outlast the test
    assert data.main(["--cifar", "/nowhere", "--only", "cifar"]) == 2
    assert capsys.readouterr().err == "error: /nowhere: no such file or folder; give the folder that holds the images\n"


def bench_imports(path: Path, **options: Any) -> set[str]:
    return set(imports(path, ".".join(path.relative_to(ROOT).parent.parts), **options))


def test_only_one_file_knows_how_the_main_job_is_built() -> None:
    """No benchmark holds a copy of the training step: `bench.training` builds and takes the step for all."""
    for path in set((ROOT / "bench").rglob("*.py")) - {ROOT / "bench/training.py"}:
        names = {n for n in bench_imports(path) if within(n, ("cjepa_fast.train", "cjepa_fast.engine"))}
        if path.name == "adamw_ema.py":  # times the optimizer itself
            names = {n for n in names if not within(n, ("cjepa_fast.engine.optim",))}
        assert names == set(), path


def test_files_of_the_benchmarks_form_no_circle() -> None:
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "bench").rglob("*.py")}
    graph = {name: {n for n in bench_imports(path) if n in names and n != name} for name, path in names.items()}
    assert len(graph) > 30
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_what_a_command_started_ends_with_the_test(tmp_path: Path) -> None:
    """A timeout interrupts the test; the command's worker must not outlive it."""
    code = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(worker.pid, file=open("worker", "w"), flush=True)
time.sleep(600)
"""

    def interrupt(*_: Any) -> None:
        if not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
            signal.setitimer(signal.ITIMER_REAL, 0.2)  # the command is still starting
            return
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, 0.2)  # the time left of this test's own timeout
    try:
        with pytest.raises(TimeoutError):
            processes.run([sys.executable, "-c", code], cwd=tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)
    worker = int((tmp_path / "worker").read_text())
    for _ in range(100):  # an orphan is reaped by init some time later; until then it is a zombie
        if not Path(f"/proc/{worker}/stat").exists() or " Z " in Path(f"/proc/{worker}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {worker} outlived its command")


def test_curves_of_runs(tmp_path: Path) -> None:
    """A line for each run in each panel; the probe starts at the untrained encoder."""
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        line = {"loss_prediction": 0.5, "feature_std": 0.3, "rankme": 3.0, "cosine_gap": 0.1, "knn_top1": None}
        lines = [{**line, "step": 20}, {**line, "step": 40, "knn_top1": 0.6}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / name / "run_state.json").write_text(json.dumps({"untrained": 0.2}))
    drawing = curves.figure({"first": tmp_path / "a", "second": tmp_path / "b"})
    assert [axis.get_title() for axis in drawing.axes] == list(curves.PANELS.values())
    for axis in drawing.axes:
        assert [line.get_label() for line in axis.lines] == ["first", "second"] and axis.get_xlabel() == "step"
    drawn = dict(zip(curves.PANELS, drawing.axes, strict=True))
    assert drawn["knn_top1"].lines[1].get_xydata().tolist() == [[0, 0.2], [40, 0.6]]
    assert drawn["rankme"].lines[0].get_xydata().tolist() == [[20, 3.0], [40, 3.0]]
    out = tmp_path / "curves.svg"
    arguments = [f"first={tmp_path / 'a'}", f"second={tmp_path / 'b'}", "--out", str(out)]
    assert curves.main(arguments) == 0
    once = out.read_bytes()
    assert curves.main(arguments) == 0 and out.read_bytes() == once, "a drawing repeats byte for byte"
    assert curves.main([f"gone={tmp_path / 'c'}", "--out", str(out)]) == 2


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'cjepa-fast\[plots\]'"):
        plots.new(1, 1)
