"""Whole-step benchmarks: what they compare before they time, how they count, and what they say of who cannot run.

That the trainers do the same work is proved on a small model; each way in which one could cheat must be seen.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.references import Schedule, eager, tuned

from bench import short_run, step, step_check, step_report, step_worker, trainers
from bench import table as bench_table
from cjepa_fast import config, ops

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_all_trainers_do_the_work_of_ours() -> None:
    assert step_check.differences(CPU) == []


def halve_the_loss(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(eager, "algorithm_1", lambda z, weights, whole=eager.algorithm_1: whole(z, weights) / 2)


def skip_a_gradient(patch: pytest.MonkeyPatch) -> None:
    whole = eager.Trainer.gradients

    def gradients(self: Any, *arguments: Any) -> Any:
        loss = whole(self, *arguments)
        self.networks.encoder.blocks[0].mlp.fc1.weight.grad *= 0.99
        return loss

    patch.setattr(eager.Trainer, "gradients", gradients)


def keep_the_average(patch: pytest.MonkeyPatch) -> None:
    whole = eager.Trainer.__init__

    def init(self: Any, networks: Any, c: Any, device: Any, schedule: Any, **options: Any) -> None:
        whole(self, networks, c, device, Schedule(ema=0.9), **options)

    patch.setattr(eager.Trainer, "__init__", init)


def decay_less(patch: pytest.MonkeyPatch) -> None:
    whole = eager.Trainer.__init__

    def init(self: Any, networks: Any, c: Any, device: Any, schedule: Any, **options: Any) -> None:
        whole(self, networks, c, device, Schedule(weight_decay=0.0), **options)

    patch.setattr(eager.Trainer, "__init__", init)


def train_on_whole_images(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(eager, "take", lambda x, indices: x[:, : indices.shape[1]])


@pytest.mark.parametrize(
    "cheat, seen",
    [
        (halve_the_loss, "loss "),
        (skip_a_gradient, "gradient of encoder.blocks.0.mlp.fc1.weight"),
        (keep_the_average, "target_encoder.* after the update"),
        (decay_less, "encoder.* after the update"),
        (train_on_whole_images, "loss "),
    ],
)
def test_a_trainer_that_cheats_is_seen(
    cheat: Callable[[pytest.MonkeyPatch], None], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheat(monkeypatch)
    monkeypatch.setattr(step_check, "VARIANTS", ("ours", "eager"))
    found = step_check.differences(CPU, mask_modes=("fixed",))
    assert any(line.startswith("eager fixed: ") for line in found)
    assert any(re.search(seen, line) for line in found), found


@pytest.mark.parametrize("name", ["eager", "tuned"])
def test_references_use_no_operation_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("an operation of ours")

    c = trainers.configure("tiny", "fixed", "fp32")
    trainer = trainers.build(trainers.Spec.parse(name), c, CPU)
    batch = trainer.batch(*trainers.sample(c, 4, 1)[0])
    for operation in ops.__all__:
        monkeypatch.setattr(ops, operation, refuse)
    trainer.step(batch)


def test_a_checkout_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_check, "VARIANTS", ("ours",))
    (found,) = step_check.differences(CPU, str(tmp_path), mask_modes=("fixed",))
    assert "vision_transformer.py is not there" in found and found.startswith("ijepa:")


@pytest.mark.parametrize("device, precision", [("cpu", "fp32"), ("cuda", "bf16")])
def test_every_rung_is_a_trainer_and_differs_from_the_one_before(device: str, precision: str) -> None:
    """Also those of a GPU: their options are known, and the last rungs switch one key after the other."""
    climb = step.rungs(device, precision)
    names = [name for _, name in climb]
    assert len(set(names)) == len(names) and names[-1] == "ours"
    keys = config.key_types()
    for name in names:
        spec = trainers.prepare_process(trainers.Spec.parse(name), torch.device("cuda"))  # leaves this process alone
        if spec.name == "ours":
            assert all(f"runtime.{key}" in keys for key in spec.options)
    off = [len(trainers.Spec.parse(name).options) for name in names if name.startswith("ours")]
    assert off == list(range(len(off) - 1, -1, -1))
    assert len(off) == 5
    switches = set(trainers.Spec.parse(next(name for name in names if name.startswith("ours"))).options)
    defaults = trainers.configure("S", "fixed", precision).runtime
    assert all(getattr(defaults, switch) is True for switch in switches - {"kernels"})


@pytest.mark.parametrize(
    "name, reason",
    [
        ("eager:attention=flash", "attention=flash is not known"),
        ("eager:speed=on", "no option 'speed'"),
        ("tuned:attention=sdpa", "no option 'attention'"),
        ("ours:speed=on", "there is no runtime.speed"),
        ("ours:predictor_shared_start=yes", "use on or off"),
        ("ijepa", "pass --ijepa-checkout"),
    ],
)
def test_who_cannot_run_says_why(name: str, reason: str) -> None:
    with pytest.raises(trainers.CannotRun, match=reason):
        trainers.build(trainers.Spec.parse(name), trainers.configure("tiny", "fixed", "fp32"), CPU)


@pytest.mark.parametrize("name, reason", [("fast", "unknown rival 'fast'"), ("eager:syncs", "write OPTION=VALUE")])
def test_a_bad_name_is_refused(name: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        step.main(["--rivals", name])
    assert refused.value.code == 2 and reason in capsys.readouterr().err


def test_the_first_loss_must_be_ours() -> None:
    def answer(loss: float) -> dict[str, Any]:
        return {"status": "ok", "loss": loss}

    answers = {"ours": answer(1.0), "eager": answer(1.0 + 8e-6), "tuned": answer(1.0 + 2e-5), "lightly": answer(9.0)}
    step.judge(answers, "fp32")
    assert [answers[name]["status"] for name in answers] == ["ok", "ok", "wrong", "ok"]
    answers = {"ours": answer(float("nan")), "eager": answer(1.0)}
    step.judge(answers, "fp32")
    assert answers["eager"]["status"] == "wrong"


def test_a_worker_that_dies_or_fails_is_a_row_with_its_reason() -> None:
    task = {"device": "cpu", "precision": "fp32", "batch": 2, "model": "tiny", "masks": "fixed", "as_train": False}
    answers = io.StringIO()
    step_worker.serve({**task, "rival": "eager:attention=flash"}, io.StringIO('{"do": "first"}\n'), answers)
    answer = json.loads(answers.getvalue())
    assert answer["status"] == "cannot run" and "flash" in answer["reason"]
    with step.Process({**task, "rival": "ours"}) as process:
        process._process.kill()
        answer = process.ask("first")
        assert answer["status"] == "failed" and "exit code -9" in answer["reason"]


def test_figures_are_ratios_of_the_same_round() -> None:
    """A round in which everything took ten times as long changes no speed-up."""
    times = {"ours": [10.0, 100.0, 10.0], "eager": [30.0, 300.0, 30.0], "tuned": [15.0, 120.0, 15.0]}
    found = step_report.figures(times, batch=4, gflop_per_image=2.0, ceiling_tflop_s=1.6)
    assert found["ours"]["speedup"] == {"eager": 3.0, "tuned": 1.5}
    assert found["tuned"]["speedup"] == {"eager": 2.0}
    assert found["ours"]["images_s"] == 400.0
    assert found["ours"]["tflop_s"] == pytest.approx(0.8) and found["ours"]["mfu"] == pytest.approx(0.5)


def test_a_rung_that_cannot_run_is_stepped_over() -> None:
    found: list[dict[str, Any]] = [
        {"label": "a", "status": "ok"}, {"label": "b", "status": "cannot run"}, {"label": "c", "status": "ok"},
        {"label": "d", "status": "ok"},
    ]  # fmt: skip
    step_report.waterfall(found, {(0, 2): ([3.0], [2.0]), (2, 3): ([2.0], [1.0])})
    assert [rung.get("factor") for rung in found] == [None, None, 1.5, 2.0]
    assert [rung.get("total") for rung in found] == [1.0, None, 1.5, 3.0]


def test_a_run_is_recorded_with_all_that_was_asked_for(tmp_path: Path, images: Path) -> None:
    """Steps of two trainers, phases, memory, and steps fed from files."""
    record, table = tmp_path / "step.json", tmp_path / "step.md"
    command = [sys.executable, "-m", "bench.step", "--quick", "--no-gate", "--batch", "4", "--rounds", "1", "--rivals",
               "ours", "eager:attention=sdpa", "--feed", str(images), "--threads", "1",
               "--json", str(record), "--markdown", str(table)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    ours, other = found["rows"]
    assert not found["gated"] and "Not gated" in table.read_text()
    assert ours["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert ours["status"] == other["status"] == "ok" and ours["median_ms"] > 0 and ours["peak_mib"] > 100
    assert set(ours["phases"]) == set(other["phases"]) == set(step_report.PHASES)
    fed = {row["rival"]: row for row in found["feed"]}
    assert set(fed) == {"ours", "eager:attention=sdpa"}
    for row in fed.values():
        assert row["status"] == "ok" and 0 <= row["wait_ms"] < row["median_ms"] and row["mask_us"] > 0
    assert [row["note"] for row in fed.values()] == ["DALI", "Pillow"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "jpegs"
    folder.mkdir()
    for index in range(8):
        pixels = torch.randint(0, 256, (80, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.jpg")
    return folder


def test_a_short_run_is_a_real_one(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the main job, whose own records it hands on."""
    monkeypatch.setenv("CJEPA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train.json"
    assert short_run.main(["--json", str(path), "--steps", "2"]) == 0
    record = json.loads(path.read_text())
    assert record["steps"] == len(record["metrics"]) == 2 and record["status"] == "completed"
    assert record["first_loss"] == record["metrics"][0]["loss"] and 0 < record["knn_trained"] <= 1
    path.unlink()
    assert short_run.main(["--json", str(path), "--data", str(images)]) == 2, "8 images are no batch"
    assert "error: " in capsys.readouterr().err and not path.exists()


def test_a_short_run_is_summed_up() -> None:
    line = {"loss": 2.0, "images_per_s": 1.0, "data_wait_ms": 900.0, "feature_std": 0.5, "step": 1}
    later = {**line, "loss": 1.0, "images_per_s": 100.0, "data_wait_ms": 10.0, "step": 2}
    found = short_run.summary([line, later], {"status": "completed", "untrained": 0.1, "knn_top1": 0.2}, 50)
    assert found["share_waited"] == pytest.approx(0.02) and found["images_per_s"] == 100.0
    assert (found["first_loss"], found["last_loss"], found["knn_trained"]) == (2.0, 1.0, 0.2)
    assert "0.02" in short_run.markdown({**found, "metrics": [], "environment": {}})


def test_the_published_collator_masks_what_the_paper_says() -> None:
    """Context and targets are disjoint, of one length each, and the mean context is that of the faithful sampler."""
    lengths = []
    for seed in range(30):
        masks = eager.collate(14, 16, torch.Generator().manual_seed(seed))
        context, *targets = masks
        assert len(targets) == 4 and len({target.shape for target in targets}) == 1
        for image in range(16):
            seen = set(context[image].tolist())
            assert len(seen) == context.shape[1] > 10
            assert all(seen.isdisjoint(target[image].tolist()) for target in targets)
        lengths.append(context.shape[1])
    sampler = trainers.train.build_sampler(trainers.configure("S", "faithful", "fp32"))
    assert sum(lengths) / len(lengths) == pytest.approx(sampler.expected_tokens(16)[0], rel=0.1)


def test_padding_of_packed_contexts_keeps_every_patch() -> None:
    (_, masks), *_ = trainers.sample(trainers.configure("tiny", "packed", "fp32"), 6, 1)
    packed = tuned.padded(masks)
    assert packed.valid is not None and masks.offsets is not None
    assert torch.equal(packed.context[packed.valid], masks.context[: int(masks.offsets[-1])].long())
    assert torch.equal(packed.valid.sum(1), masks.offsets.diff().long())


def test_the_readme_shows_what_the_results_say(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme == bench_table.replaced(readme, bench_table.table(ROOT / "bench/results")), (
        "run python -m bench.table"
    )
    environment = {"gpu": "H", "cpu": "C", "threads": 2, "torch": "2", "commit": "c"}
    row = {"model": "L", "masks": "packed", "rival": "ours", "status": "ok", "images_s": 1234.0, "mfu": 0.58}
    row["speedup"] = {"eager": 3.21, "tuned": 1.2}
    record = {"environment": environment, "precision": "bf16", "batch": 128, "rows": [row]}
    (tmp_path / "step-h.json").write_text(json.dumps(record))
    feeds = [
        {
            "case": "x",
            "variant": variant,
            "role": role,
            "status": "ok",
            "images_per_cpu_s": rate,
            "commit": "d",
            "gpu": None,
        }
        for variant, role, rate in (
            ("ours", "ours", 50.0),
            ("ours, tar shards", "ours", 60.0),
            ("a", "rival", 40.0),
            ("b", "rival", 30.0),
        )
    ]
    (tmp_path / "data-h.jsonl").write_text("".join(json.dumps(feed) + "\n" for feed in feeds))
    text = bench_table.table(tmp_path)
    assert "| L, packed | 1,234 | 3.21 | 1.20 | 58% |" in text
    assert "| x | 50 (1.25x) | 60 (1.50x) | a: 40 |" in text and "Not yet" not in text
