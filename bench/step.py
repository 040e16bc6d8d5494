"""Times whole training steps beside trainers that do the same work:  python -m bench.step --models S B --batch 16

Every trainer (see bench/trainers.py) has a process of its own; they take turns in rounds, on the same initial weights,
images and masks. Before anything is timed all are compared with ours in fp32 on a small model: loss, every gradient,
and the weights after optimizer and EMA (`--check` does that alone). The first loss must agree here, too. What cannot
run is listed with its reason. See docs/benchmarks.md for the columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import readers, run, step_check, step_report, timing, trainers
from cjepa_fast.engine.cost import gflop_per_image

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]

LOSS_LIMITS = {"fp32": 1e-5, "bf16": 2e-2}  # relative difference of the first loss to ours
_ANSWER_S = 900
_TURN_S = {"cuda": 0.4, "cpu": 0.4}  # least length of a turn

# of ours, exact each: key under `runtime` and what it adds; the first is all that the kernels are on a CPU, where a GPU
# has them from the start, the second concerns 16 bits alone
_SWITCHES = {
    "kernels": "linear layers by oneDNN",
    "weight_copies": "weights rounded once a step",
    "predictor_targets_only": "last predictor block: target rows alone",
    "predictor_shared_start": "first predictor block: context once",
    "target_union_only": "last target block: target rows alone",
}


def rungs(device: str, precision: str) -> list[tuple[str, str]]:
    """What the waterfall climbs, from the published trainer to ours: label and trainer, one change at a time.

    On a CPU the host is the device, our kernels are the eager ones and nothing is compiled, so those rungs are left
    out, and glibc's habit of giving memory back comes first.
    """
    gpu = device == "cuda"
    climb = (
        [("as published", "eager")]
        if gpu
        else [("as published", "eager:keep_memory=off"), ("freed memory kept", "eager")]
    )
    climb += [
        ("fused attention", "eager:attention=sdpa"),
        ("VICReg in one pass", "eager:attention=sdpa,pairs=off"),
    ]
    habits = "attention=sdpa,pairs=off"
    if gpu:
        habits += ",syncs=off"
        climb.append(("no wait for the device, no GradScaler", f"eager:{habits}"))
    climb += [
        ("fused AdamW, EMA in a few launches", f"eager:{habits},fused=on"),
        ("patches gathered first, no copies, bf16 stream" if gpu else "patches gathered first, no copies",
         "tuned:compile=off"),
    ]  # fmt: skip
    if gpu:
        climb.append(("torch.compile", "tuned"))

    def ours(**options: str) -> str:
        return "ours:" + ",".join(f"{key}={value}" for key, value in options.items())

    left_out = {"kernels"} if gpu else set()
    left_out |= {"weight_copies"} if precision == "fp32" else set()
    off = {key: "eager" if key == "kernels" else "off" for key in _SWITCHES if key not in left_out}
    climb.append(("our step, its kernels" if gpu else "our step", ours(**off)))
    for switch in list(off):
        del off[switch]
        climb.append((_SWITCHES[switch], ours(**off) if off else "ours"))
    return climb


class Process:
    """A trainer at work in `bench.step_worker`."""

    def __init__(self, task: Row, environment: dict[str, str] | None = None) -> None:
        self.name, self.began = task["rival"], time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.step_worker", json.dumps(task)], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self._rest = b""

    def send(self, command: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what became of it shows in the answer

    def receive(self, seconds: float = _ANSWER_S) -> Row:
        """The answer to what was sent; a process that died or is silent is a failure with its reason."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return {"status": "failed", "reason": f"no answer within {seconds:.0f} s"}
            if not (more := os.read(self._process.stdout.fileno(), 65536)):
                return {"status": "failed", "reason": f"its process ended with exit code {self._process.wait()}"}
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def ask(self, command: str, **arguments: Any) -> Row:
        self.send(command, **arguments)
        return self.receive()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


class Team:
    """Trainers of one model and mask mode that take turns; a context manager that ends their processes."""

    def __init__(self, device: str, precision: str, batch: int, model: str, masks: str, rounds: int) -> None:
        self.device, self.precision, self.rounds = device, precision, rounds
        self.task = {
            "device": device, "precision": precision, "batch": batch, "model": model, "masks": masks, "as_train": False,
        }  # fmt: skip
        self.members: dict[str, Process] = {}

    def start(self, names: Sequence[str]) -> dict[str, Row]:
        """Answers to the first step. On a GPU they start together, as compiling takes the host long."""
        answers: dict[str, Row] = {}
        for name in names:
            self.members[name] = Process({**self.task, "rival": name})
            self.members[name].send("first")
            if self.device == "cpu":
                answers[name] = self.members[name].receive()
        for name in names:
            if name not in answers:
                answers[name] = self.members[name].receive()
        for name in names:  # who lacked memory because the others were at work gets it now
            if answers[name]["status"] == "out of memory":
                answers[name] = self.members[name].ask("first")
        return answers

    def take_turns(self, names: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, Row]]:
        """Milliseconds a step of each, round by round, and the answers of those that failed on the way."""
        warm_up = 1 if self.device == "cuda" else 0
        steps, failures = {}, {}
        for name in names:
            answer = self.members[name].ask("run", steps=1, warm_up=2 * warm_up)
            if answer["status"] == "ok":
                steps[name] = max(1, round(1e3 * _TURN_S[self.device] / answer["ms"]))
            else:
                failures[name] = answer
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(self.rounds):
            order = list(steps)
            for index in range(len(order)):
                name = order[(index + turn) % len(order)]  # what ran before leaves its heat
                answer = self.members[name].ask("run", steps=steps[name], warm_up=warm_up)
                if answer["status"] == "ok":
                    times[name].append(answer["ms"])
                else:
                    failures[name] = answer
            for name in failures:
                steps.pop(name, None)
                times.pop(name, None)
        return times, failures

    def close(self, name: str) -> None:
        self.members.pop(name).__exit__()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self.members):
            self.close(name)


def role(name: str) -> str:
    kind = name.partition(":")[0]
    return "ours" if kind == "ours" else "yardstick" if kind in trainers.YARDSTICKS else "rival"


def judge(answers: dict[str, Row], precision: str) -> None:
    """Marks as wrong what does not start from our loss (or, where ours did not run, from the first's)."""
    losses = {n: a["loss"] for n, a in answers.items() if a["status"] == "ok" and role(n) != "yardstick"}
    if not losses:
        return
    truth = next((loss for name, loss in losses.items() if role(name) == "ours"), next(iter(losses.values())))
    for name, loss in losses.items():
        if not abs(loss - truth) <= LOSS_LIMITS[precision] * abs(truth):
            answers[name].update(status="wrong", reason=f"its first loss is {loss:.7g}, ours {truth:.7g}")


def time_model(
    team: Team, names: Sequence[str], batch: int, ceiling_tflop_s: float, publish: Callable[[Row], None]
) -> bool:
    """One row for each trainer; False if one of ours could not run or was wrong."""
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
            row.update(gflop_per_image=flop, **step_report.figures(times, batch, flop, ceiling_tflop_s)[name])
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
    """The waterfall: each rung takes turns with the last before it that runs, two processes at a time on a CPU."""
    plan = rungs(team.device, team.precision)
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
    step_report.waterfall(found, pairs)
    fall = {"model": team.task["model"], "masks": team.task["masks"], "rungs": found, "direct": None}
    ran = [rung["rival"] for rung in found if rung["status"] == "ok"]
    if len(ran) > 1:  # the product of many ratios drifts, one ratio does not
        ends = (ran[0], ran[-1])
        team.start([name for name in ends if name not in team.members])
        times, _ = team.take_turns(ends)
        if len(times) == 2:
            fall["direct"] = step_report.speedup(times[ends[1]], times[ends[0]])
    return fall


def feed(team: Team, names: Sequence[str], images: readers.Images, threads: int) -> list[Row]:
    """Steps fed from JPEGs, in turns; each first steps until what its feed had read ahead is used up."""
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
                base: step_report.speedup(*([turn["ms"] for turn in found[who]] for who in (name, base)))
                for base in step_report.BASES if base in found and base != name
            }  # fmt: skip
        rows.append(row)
    return rows


def start_up(team: Team, names: Sequence[str]) -> list[Row]:
    """Seconds from a fresh process to its first step, as training builds it, with an empty and with a warm cache."""
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = list(trainers.MODELS)
    parser.add_argument("--models", nargs="*", choices=models, help="[S B on a CPU, S B L H on a GPU]")
    parser.add_argument("--batch", type=int, help="images a step [16 on a CPU, 128 on a GPU]")
    parser.add_argument("--rivals", nargs="+", default=["ours", "eager", "tuned"], metavar="NAME[:OPTION=VALUE,...]",
                        help=f"of: {', '.join(trainers.NAMES)} [ours eager tuned]")  # fmt: skip
    parser.add_argument("--masks", nargs="+", choices=("fixed", "packed"), default=["fixed"], help="[fixed]")
    parser.add_argument("--rounds", type=int, help="turns of each [5 on a CPU, 12 on a GPU]")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after this [no limit]")
    parser.add_argument("--waterfall", nargs="*", choices=models, default=[], help="models to climb from eager to ours")
    parser.add_argument("--startup", nargs="*", choices=models, default=[], help="models to time from a fresh process")
    parser.add_argument("--feed", metavar="ROOT", help="also time the first model fed from JPEGs at this data.root")
    parser.add_argument("--threads", type=int, default=min(12, len(os.sched_getaffinity(0))),
                        help="that decode for --feed, or processes of a DataLoader [cores, at most 12]")  # fmt: skip
    parser.add_argument("--ijepa-checkout", metavar="PATH", help="also time the original repository checked out there")
    parser.add_argument("--precision", choices=tuple(LOSS_LIMITS), help="[bf16 on a GPU, fp32 on a CPU]")
    parser.add_argument("--json", type=Path, help="write the record, again after each result")
    parser.add_argument("--markdown", type=Path, help="write tables")
    parser.add_argument("--figure", type=Path, help="draw the waterfalls (SVG)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds: to see that the pieces fit")
    parser.add_argument("--check", action="store_true", help="compare the trainers with ours in fp32 and leave")
    parser.add_argument("--no-gate", action="store_true", help="do not compare before; marks the record gated=false")
    parser.add_argument("--rehearsal", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.check:
        return step_check.main(device, arguments.ijepa_checkout)
    names = list(dict.fromkeys(arguments.rivals))
    if arguments.ijepa_checkout is not None:
        names.append(f"ijepa:checkout={Path(arguments.ijepa_checkout).resolve()}")
    for name in names:
        try:
            trainers.Spec.parse(name)
        except ValueError as error:
            parser.error(str(error))
    if arguments.models is None:
        arguments.models = ["tiny"] if arguments.quick else ["S", "B"] if device == "cpu" else ["S", "B", "L", "H"]
    precision = arguments.precision or ("bf16" if device == "cuda" else "fp32")
    batch = arguments.batch or (8 if arguments.quick else 16 if device == "cpu" else 128)
    rounds = arguments.rounds or (3 if arguments.quick else 5 if device == "cpu" else 12)
    deadline = time.monotonic() + arguments.seconds

    good = True
    if not arguments.no_gate and (wrong := step_check.differences(torch.device(device), arguments.ijepa_checkout)):
        print("\n".join(wrong), file=sys.stderr)
        if any(line.startswith("ours") for line in wrong):
            return 1
        wrong_names = {line.partition(" ")[0].partition(":")[0] for line in wrong}
        names = [name for name in names if name.partition(":")[0] not in wrong_names]
        good = False
    record: Row = {
        "environment": run.environment(device), "device": device, "precision": precision, "batch": batch,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "quick": arguments.quick,
        "gated": not arguments.no_gate, "rehearsal": arguments.rehearsal,
        "ceiling_tflop_s": 0.0, "rows": [], "waterfall": [], "startup": [], "feed": [],
        "not_run": [],
    }  # fmt: skip

    def measure_ceiling() -> None:
        """The best product of the whole run counts: on a shared machine one look may meet a neighbour at work."""
        found = timing.ceilings(device, run.DTYPES[precision], arguments.quick).matmul_tflop_s
        record["ceiling_tflop_s"] = max(record["ceiling_tflop_s"], found)
        if device == "cuda":
            torch.cuda.empty_cache()
        for row in record["rows"]:
            if "tflop_s" in row:
                row["mfu"] = row["tflop_s"] / record["ceiling_tflop_s"]

    def save() -> None:
        if arguments.json is not None:
            _replace(arguments.json, json.dumps(record, indent=1) + "\n")
        if arguments.markdown is not None:
            _replace(arguments.markdown, step_report.markdown(record))
        if arguments.figure is not None and record["waterfall"]:
            title = record["environment"]["gpu"] or record["environment"]["cpu"]
            _replace(arguments.figure, step_report.figure(record["waterfall"], f"{title}, {precision}, batch {batch}"))

    def publish(row: Row) -> None:
        record["rows"].append(row)
        print(step_report.step_table([row])[-1], flush=True)
        save()

    jobs = [("steps", model, masks) for model in arguments.models for masks in arguments.masks]
    jobs += [("waterfall", model, arguments.masks[0]) for model in arguments.waterfall]
    root: str | None = arguments.feed
    jobs += [("feed", model, "fixed") for model in arguments.models[:1] if root is not None]
    jobs += [("startup", model, arguments.masks[0]) for model in arguments.startup]
    print("\n".join(step_report.step_table([])))
    measure_ceiling()
    for job, model, masks in jobs:
        if time.monotonic() > deadline:
            record["not_run"].append(f"{job} {model} {masks}")
            continue
        with Team(device, precision, batch, model, masks, rounds) as team:
            if job == "steps":
                good &= time_model(team, names, batch, record["ceiling_tflop_s"], publish)
            elif job == "waterfall":
                record["waterfall"].append(climb(team))
                print("\n".join(step_report.waterfall_table(record["waterfall"][-1])), flush=True)
            elif root is not None and job == "feed":
                wanted = [name for name in names if role(name) != "yardstick"]
                with tempfile.TemporaryDirectory(prefix="bench-step-") as work:
                    size = trainers.configure(model, masks, precision).model.image_size
                    images = readers.lay_out(
                        readers.read_jpegs(root, 1000), Path(work), name=Path(root).name, size=size,
                        batch_size=batch, shards=1,
                    )  # fmt: skip
                    record["feed"] += feed(team, wanted, images, arguments.threads)
                print("\n".join(step_report.feed_table(record["feed"])), flush=True)
            else:
                wanted = [name for name in names if role(name) != "yardstick"]
                record["startup"] += start_up(team, wanted)
                print("\n".join(step_report.startup_table(record["startup"])), flush=True)
        if job == "steps":
            measure_ceiling()
        save()
    if record["not_run"]:
        print(f"not run, out of time: {', '.join(record['not_run'])}", file=sys.stderr)
    save()
    return 0 if good else 1


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
