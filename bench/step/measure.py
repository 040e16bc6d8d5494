"""The measurements of `bench.step`: steps, the waterfall, steps fed from JPEGs, and the start of a process."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence

from bench.feed.images import Images
from bench.flop import gflop_per_image
from bench.records import Row
from bench.step import report, trainers
from bench.step.team import Process, Team, judge, role


def rungs(device: str) -> list[tuple[str, str]]:
    """Return the waterfall from the published trainer to ours: label and trainer of each rung, one change at a time.

    On a CPU nothing waits for a device and nothing is compiled, so those rungs are left out.
    """
    habits = "attention=sdpa,pairs=off"
    climb = [
        ("as published", "eager"),
        ("fused attention", "eager:attention=sdpa"),
        ("VICReg in one pass", f"eager:{habits}"),
    ]
    if device == "cpu":
        return [
            *climb,
            ("fused AdamW, EMA in a few launches", f"eager:{habits},fused=on"),
            ("patches gathered first, no copies", "tuned:compile=off"),
            ("our step", "ours:kernels=eager"),
            ("linear layers by oneDNN", "ours"),
        ]
    return [
        *climb,
        ("no wait for the device, no GradScaler", f"eager:{habits},syncs=off"),
        ("fused AdamW, EMA in a few launches", f"eager:{habits},syncs=off,fused=on"),
        ("patches gathered first, no copies, bf16 stream", "tuned:compile=off"),
        ("torch.compile", "tuned"),
        ("our step, its kernels", "ours"),
        ("a CUDA graph a step", "ours:cuda_graph=on"),
    ]


def time_model(
    team: Team, names: Sequence[str], batch: int, ceiling_tflop_s: float, publish: Callable[[Row], None]
) -> bool:
    """Publish a row for each trainer; return False if one of ours could not run or was wrong."""
    model, masks = team.task["model"], team.task["masks"]
    answers = team.start(names)
    judge(answers, team.precision)
    times, failures = team.take_turns([name for name in names if answers[name]["status"] == "ok"])
    answers.update(failures)
    rows = []
    for name in names:
        answer = answers[name]
        row: Row = {
            "model": model, "masks": masks, "rival": name, "role": role(name), "batch": batch,
            "precision": team.precision, "status": answer["status"], "reason": answer.get("reason"),
            "note": answer.get("note"), "loss": answer.get("loss"), "context_tokens": answer.get("context_tokens"),
            "target_tokens": answer.get("target_tokens"),
        }  # fmt: skip
        if name in times:
            flop = gflop_per_image(
                trainers.configure(model, masks, team.precision), context_tokens=answer["context_tokens"],
                target_tokens=answer["target_tokens"],
            ).total  # fmt: skip
            row.update(gflop_per_image=flop, **report.figures(times, batch, flop, ceiling_tflop_s)[name])
            row.update(peak_mib=team.members[name].ask("memory").get("peak_mib"))
            apart = team.members[name].ask(
                "phases", steps=2 if team.device == "cpu" else 5, warm_up=0 if team.device == "cpu" else 2
            )
            row["phases"] = apart.get("phases")
        rows.append(row)
    for row in rows:
        publish(row)
    return all(row["status"] == "ok" for row in rows if row["role"] == "ours")


def climb(team: Team) -> Row:
    """Measure the waterfall: each rung takes turns with the last rung before it that runs."""
    plan = rungs(team.device)
    found = [{"label": label, "rival": name, "status": "not run", "reason": None} for label, name in plan]
    ahead: dict[str, Row] = team.start([name for _, name in plan]) if team.device == "cuda" else {}
    pairs: dict[tuple[int, int], tuple[Sequence[float], Sequence[float]]] = {}
    last: int | None = None
    for index, (_, name) in enumerate(plan):
        answer = ahead.get(name) or team.start([name])[name]
        found[index].update(status=answer["status"], reason=answer.get("reason"), loss=answer.get("loss"))
        if answer["status"] == "ok" and last is not None:
            before = plan[last][1]
            times, failures = team.take_turns([before, name])
            if before in failures:
                raise RuntimeError(f"{before} ran and then did not: {failures[before]['reason']}")
            if name in failures:
                found[index].update(status=failures[name]["status"], reason=failures[name]["reason"])
            else:
                pairs[last, index] = (times[before], times[name])
                team.close(before)
        if found[index]["status"] == "ok":
            last = index
    report.waterfall(found, pairs)
    fall = {"model": team.task["model"], "masks": team.task["masks"], "rungs": found, "direct": None}
    ran = [rung["rival"] for rung in found if rung["status"] == "ok"]
    if len(ran) > 1:  # a product of many ratios drifts, a single ratio does not
        ends = (ran[0], ran[-1])
        team.start([name for name in ends if name not in team.members])
        times, _ = team.take_turns(ends)
        if len(times) == 2:
            fall["direct"] = report.speedup(times[ends[1]], times[ends[0]])
    return fall


def feed(team: Team, names: Sequence[str], images: Images, threads: int) -> list[Row]:
    """Measure steps fed from JPEGs, in turns; warm-up steps use up the batches that each feed read ahead."""
    gpu = team.device == "cuda"
    warm_up, steps = (4 * threads, 40) if gpu else (4, 6)
    asked = {"images": {**dataclasses.asdict(images), "folder": str(images.folder)}, "threads": threads}
    answers = team.start(names)
    found: dict[str, list[Row]] = {name: [] for name in names if answers[name]["status"] == "ok"}
    for _ in range(3):
        for name in list(found):
            answer = answers[name] = team.members[name].ask("feed", **asked, steps=steps, warm_up=warm_up)
            found[name].append(answer)
            if answer["status"] != "ok":
                del found[name]
    rows = []
    for name in names:
        answer = answers[name]
        row: Row = {"model": team.task["model"], "rival": name, "images": images.name, "threads": threads,
                    "status": answer["status"], "reason": answer.get("reason"), "note": answer.get("note")}  # fmt: skip
        if name in found:
            row |= {f"{key}_ms": statistics.median(turn[name_of] for turn in found[name])
                    for key, name_of in (("median", "ms"), ("wait", "wait_ms"))}  # fmt: skip
            row |= {"images_s": images.batch_size / row["median_ms"] * 1e3, "mask_us": answer["mask_us"]}
            row["speedup"] = {
                base: report.speedup(*([turn["ms"] for turn in found[who]] for who in (name, base)))
                for base in report.BASES if base in found and base != name
            }  # fmt: skip
        rows.append(row)
    return rows


def start_up(team: Team, names: Sequence[str]) -> list[Row]:
    """Measure seconds from a fresh process to its first step, with an empty and with a warm compile cache."""
    rows = []
    for name in names:
        row: Row = {"model": team.task["model"], "masks": team.task["masks"], "rival": name, "status": "ok"}
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
            for cache in ("cold_s", "warm_s"):
                with Process({**team.task, "rival": name, "as_train": True}, caches) as process:
                    answer = process.ask("first")
                    if answer["status"] != "ok":
                        row.update(status=answer["status"], reason=answer["reason"])
                        break
                    row[cache] = answer["done_at"] - process.began
                    row.update(process.ask("memory"))
        rows.append(row)
    return rows
