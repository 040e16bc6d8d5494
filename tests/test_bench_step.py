"""Whole-step benchmarks: the comparison before the timing, the figures, and the reasons of trainers that cannot run.

A small model shows that the trainers do the same work; every way to cheat must be seen.
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

from bench import records, short_run
from bench import table as bench_table
from bench.flop import gflop_per_image
from bench.step import check, command, measure, report, team, trainers, worker
from bench.step.references import Schedule, eager, tuned
from bench.training import build_sampler
from cjepa_fast import config, ops
from cjepa_fast.config import Config
from cjepa_fast.config.presets import PRESETS

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_all_trainers_do_the_work_of_ours() -> None:
    assert check.differences(CPU) == []


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
    monkeypatch.setattr(check, "VARIANTS", ("ours", "eager"))
    found = check.differences(CPU, mask_modes=("fixed",))
    assert any(line.startswith("eager fixed: ") for line in found)
    assert any(re.search(seen, line) for line in found), found


@pytest.mark.parametrize("name", ["eager", "tuned"])
def test_references_use_no_operation_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("an operation of ours")

    c = trainers.configure("tiny", "fixed", "fp32")
    trainer = trainers.build(trainers.Spec.parse(name), c, CPU)
    batch = trainer.batch(trainers.sample(c, 4, 1)[0])
    operations = [name for name, value in vars(ops).items() if callable(value) and not name.startswith("_")]
    assert {"attention", "adamw_ema", "patch_embed", "predictor_rows", "variance_covariance"} <= set(operations)
    for operation in operations:
        monkeypatch.setattr(ops, operation, refuse)
    trainer.step(batch)


def test_a_checkout_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "VARIANTS", ("ours",))
    (found,) = check.differences(CPU, str(tmp_path), mask_modes=("fixed",))
    assert "vision_transformer.py is not there" in found and found.startswith("ijepa:")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_rung_is_a_trainer_and_differs_from_the_one_before(device: str) -> None:
    """The options of a GPU's rungs are known, too."""
    names = [name for _, name in measure.rungs(device)]
    assert len(set(names)) == len(names) and names[0] == "eager" and "ours" in names
    for name in names:
        spec = trainers.Spec.parse(name)
        if spec.name == "ours":
            assert all(f"runtime.{key}" in config.key_types() for key in spec.options)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("eager:attention=flash", "attention=flash is not known"),
        ("eager:speed=on", "no option 'speed'"),
        ("tuned:attention=sdpa", "no option 'attention'"),
        ("ours:speed=on", "there is no runtime.speed"),
        ("ours:kernels=fast", "runtime.kernels: 'fast' is not one of auto, triton, eager"),
        ("ours:accumulate=0", "runtime.accumulate: "),
        ("ours:cuda_graph=on", "runtime.cuda_graph: "),
        ("ijepa", "pass --ijepa-checkout"),
    ],
)
def test_who_cannot_run_says_why(name: str, reason: str) -> None:
    with pytest.raises(trainers.CannotRun, match=reason):
        trainers.build(trainers.Spec.parse(name), trainers.configure("tiny", "fixed", "fp32"), CPU)


@pytest.mark.parametrize("name, reason", [("fast", "unknown rival 'fast'"), ("eager:syncs", "write OPTION=VALUE")])
def test_a_bad_name_is_refused(name: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main(["--rivals", name])
    assert refused.value.code == 2 and reason in capsys.readouterr().err


def test_the_first_loss_must_be_ours() -> None:
    def answer(loss: float) -> dict[str, Any]:
        return {"status": "ok", "loss": loss}

    answers = {"ours": answer(1.0), "eager": answer(1.0 + 8e-6), "tuned": answer(1.0 + 2e-5), "lightly": answer(9.0)}
    team.judge(answers, "fp32")
    assert [answers[name]["status"] for name in answers] == ["ok", "ok", "wrong", "ok"]
    answers = {"ours": answer(float("nan")), "eager": answer(1.0)}
    team.judge(answers, "fp32")
    assert answers["eager"]["status"] == "wrong"


def test_a_worker_that_dies_or_fails_is_a_row_with_its_reason() -> None:
    task = {"device": "cpu", "precision": "fp32", "batch": 2, "model": "tiny", "masks": "fixed", "as_train": False}
    answers = io.StringIO()
    worker.serve({**task, "rival": "eager:attention=flash"}, io.StringIO('{"do": "first"}\n'), answers)
    answer = json.loads(answers.getvalue())
    assert answer["status"] == "cannot run" and "flash" in answer["reason"]
    with team.Process({**task, "rival": "ours"}) as process:
        process._process.kill()
        answer = process.ask("first")
        assert answer["status"] == "failed" and "exit code -9" in answer["reason"]


def test_figures_are_ratios_of_the_same_round() -> None:
    """A round in which everything took ten times as long changes no speed-up."""
    times = {"ours": [10.0, 100.0, 10.0], "eager": [30.0, 300.0, 30.0], "tuned": [15.0, 120.0, 15.0]}
    found = report.figures(times, batch=4, gflop_per_image=2.0, ceiling_tflop_s=1.6)
    assert found["ours"]["speedup"] == {"eager": 3.0, "tuned": 1.5}
    assert found["tuned"]["speedup"] == {"eager": 2.0}
    assert found["ours"]["images_s"] == 400.0
    assert found["ours"]["tflop_s"] == pytest.approx(0.8) and found["ours"]["mfu"] == pytest.approx(0.5)


def test_a_rung_that_cannot_run_is_stepped_over() -> None:
    found: list[dict[str, Any]] = [
        {"label": "a", "status": "ok"}, {"label": "b", "status": "cannot run"}, {"label": "c", "status": "ok"},
        {"label": "d", "status": "ok"},
    ]  # fmt: skip
    report.waterfall(found, {(0, 2): ([3.0], [2.0]), (2, 3): ([2.0], [1.0])})
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
    assert set(ours["phases"]) == set(other["phases"]) == set(report.PHASES)
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
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The main job runs as a process of its own, and its records are handed on."""
    monkeypatch.setenv("CJEPA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train.json"
    assert short_run.main(["--json", str(path), "--steps", "2"]) == 0
    record = json.loads(path.read_text())
    assert record["steps"] == len(record["metrics"]) == 2 and record["status"] == "completed"
    assert record["first_loss"] == record["metrics"][0]["loss"] and 0 < record["knn_trained"] <= 1
    path.unlink()
    assert short_run.main(["--json", str(path), "--data", str(images)]) == 2, "8 images are no batch"
    assert "error: " in capfd.readouterr().err and not path.exists()


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
    sampler = build_sampler(trainers.configure("S", "faithful", "fp32"))
    assert sum(lengths) / len(lengths) == pytest.approx(sampler.expected_tokens(16)[0], rel=0.1)


def test_padding_of_packed_contexts_keeps_every_patch() -> None:
    masks = trainers.sample(trainers.configure("tiny", "packed", "fp32"), 6, 1)[0].masks
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
    rates = {"ours": 50.0, "ours, tar shards": 60.0, "a": 40.0, "b": 30.0}
    feeds = [
        {"case": "x", "variant": name, "role": "ours" if name.startswith("ours") else "rival", "status": "ok",
         "images_per_cpu_s": rate, "commit": "d", "gpu": None}
        for name, rate in rates.items()
    ]  # fmt: skip
    (tmp_path / "data-h.jsonl").write_text("".join(json.dumps(feed) + "\n" for feed in feeds))
    text = bench_table.table(tmp_path)
    assert "| L, packed | 1,234 | 3.21 | 1.20 | 58% |" in text
    assert "| x | 50 (1.25x) | 60 (1.50x) | a: 40 |" in text and "Not yet" not in text


def test_figures_are_drawn_again_from_the_records(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ("step-cpu", "scale-model")
    for name in names:
        (tmp_path / f"{name}.json").write_bytes((ROOT / f"bench/results/{name}.json").read_bytes())
    bench_table.draw(tmp_path)
    once = [(tmp_path / f"{name}.svg").read_text() for name in names]
    assert "ViT-S, fixed masks" in once[0] and "GPUs" in once[1] and not any("dc:date" in text for text in once)
    bench_table.draw(tmp_path)
    assert once == [(tmp_path / f"{name}.svg").read_text() for name in names]


def test_a_table_fills_up_short_rows_and_keeps_its_columns() -> None:
    assert records.table("a|>b|c", [["x|y", "1", "2"], ["z", "why\nnot"]]) == [
        "| a | b | c |", "| --- | --: | --- |", "| x/y | 1 | 2 |", "| z |  | why not |",
    ]  # fmt: skip


def test_a_waterfall_is_drawn_rung_by_rung() -> None:
    """A bar from the total before to the total with a rung, for each rung that ran, in each panel."""
    pytest.importorskip("matplotlib")
    record = json.loads((ROOT / "bench/results/step-cpu.json").read_text())
    ran = record["waterfall"][0]["rungs"]
    lost = {"label": "lost", "rival": "x", "status": "cannot run", "reason": "no"}
    falls = [record["waterfall"][0], {"model": "B", "masks": "packed", "rungs": [ran[0], lost, ran[1]], "direct": None}]
    first, second = report.figure({**record, "waterfall": falls}).axes
    assert (first.get_title(), second.get_title()) == ("ViT-S, fixed masks", "ViT-B, packed masks")
    assert first.get_xlabel() == "speed over the first"
    assert [label.get_text() for label in second.get_yticklabels()] == [ran[0]["label"], ran[1]["label"]]
    totals = [rung["total"] for rung in ran]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in first.patches]
    assert ends == [pytest.approx(pair) for pair in zip([0.0, *totals[:-1]], totals, strict=True)]
    assert len(second.patches) == 2 and second.texts[1].get_text().split() == ["1.01x", "(x1.01)"]
    assert report.figure({**record, "waterfall": []}).axes == []


SMALL, BASE, LARGE = (PRESETS[f"cjepa_vit_{name}16_in1k"] for name in ("small", "base", "large"))
HUGE = PRESETS["ijepa_vit_huge14_in1k"]


# mean tokens (context, target) and the GFLOP per image (context, target, predictor) of a hand count: batches cut to
# their shortest context, and whole contexts
@pytest.mark.parametrize(
    ("c", "tokens", "printed"),
    [
        (SMALL, (50.2, 33.4), (6.7, 9.1, 22.2)),
        (BASE, (50.2, 33.4), (26.2, 34.9, 22.4)),
        (LARGE, (50.2, 33.4), (92.1, 122.5, 44.6)),
        (HUGE, (68.0, 44.4), (259.5, 333.2, 60.8)),
        (SMALL, (81.8, 33.4), (11.0, 9.1, 31.0)),
        (BASE, (81.8, 33.4), (42.8, 34.9, 31.2)),
        (LARGE, (81.8, 33.4), (150.7, 122.5, 62.2)),
        (HUGE, (109.8, 44.4), (421.1, 333.2, 84.8)),
    ],
)
def test_gflop_table(c: Config, tokens: tuple[float, float], printed: tuple[float, float, float]) -> None:
    flop = gflop_per_image(c, context_tokens=tokens[0], target_tokens=tokens[1])
    # half a unit of the last printed digit, and 0.2 % for attention at the mean instead of over the spread
    assert flop[:3] == pytest.approx(printed, rel=0.002 if tokens[0] > 80 else 1e-4, abs=0.051)


def test_flop_of_the_projector() -> None:
    """A linear layer for each mean embedding, forward and backward: 4 target blocks, or context and target."""
    c = config.replace(SMALL, {"loss.projector": (100, 100, 100)})
    layers = 6 * (384 * 100 + 2 * 100 * 100) / 1e9
    for views, changes in (
        (4, {}), (2, {"loss.vicreg_views": "context_target"}), (0, {"method": "ijepa"}),
    ):  # fmt: skip
        flop = gflop_per_image(config.replace(c, changes), context_tokens=50, target_tokens=33)
        assert flop.projector == pytest.approx(views * layers)
        assert flop.total == pytest.approx(sum(flop[:3]) + views * layers)
