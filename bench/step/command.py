"""Times whole training steps beside trainers that do the same work:  python -m bench.step --models S B --batch 16

Every trainer (see bench/step/trainers.py) has its own process. They take turns in rounds, on the same initial weights,
images and masks. Before the timing all are compared with ours in fp32 on a small model: loss, every gradient, and the
weights after optimizer and EMA (`--check` does that alone). The first loss of the timed model must agree, too. A
trainer that cannot run is listed with its reason. See docs/benchmarks.md for the columns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import plots, records, timing
from bench.feed.images import lay_out, read_jpegs
from bench.records import Row
from bench.step import check, measure, report, trainers
from bench.step.team import LOSS_LIMITS, Team, role
from cjepa_fast.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.check:
        return check.main(device, arguments.ijepa_checkout)
    names = list(dict.fromkeys(arguments.rivals))
    if arguments.ijepa_checkout is not None:
        names.append(f"ijepa:checkout={Path(arguments.ijepa_checkout).resolve()}")
    try:
        for name in names:
            trainers.Spec.parse(name)
        if arguments.figure is not None:
            plots.new(1, 1)
    except (ValueError, UserError) as error:
        parser.error(str(error))
    gpu = device == "cuda"
    if arguments.models is None:
        arguments.models = ["tiny"] if arguments.quick else ["S", "B", "L", "H"] if gpu else ["S", "B"]
    arguments.precision = arguments.precision or ("bf16" if gpu else "fp32")
    arguments.batch = arguments.batch or (8 if arguments.quick else 128 if gpu else 16)
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 12 if gpu else 5)
    good = True
    if not arguments.no_gate and (wrong := check.differences(torch.device(device), arguments.ijepa_checkout)):
        print("\n".join(wrong), file=sys.stderr)
        if any(line.startswith("ours") for line in wrong):
            return 1
        wrong_names = {line.partition(" ")[0].partition(":")[0] for line in wrong}
        names = [name for name in names if name.partition(":")[0] not in wrong_names]
        good = False
    try:
        return 0 if Run(arguments, device).measure(names) and good else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class Run:
    """The record of a run, and its files, which are written again after each result."""

    def __init__(self, arguments: argparse.Namespace, device: str) -> None:
        self.arguments, self.device = arguments, device
        self.record: Row = {
            "environment": records.environment(device), "device": device, "precision": arguments.precision,
            "batch": arguments.batch, "date": records.now(), "quick": arguments.quick, "gated": not arguments.no_gate,
            "rehearsal": arguments.rehearsal, "ceiling_tflop_s": 0.0, "rows": [], "waterfall": [], "startup": [],
            "feed": [], "not_run": [],
        }  # fmt: skip

    def measure(self, names: list[str]) -> bool:
        """Measure everything that the options ask for; return False if one of ours failed or was wrong."""
        options, record = self.arguments, self.record
        deadline, good = time.monotonic() + options.seconds, True
        jobs = [("steps", model, masks) for model in options.models for masks in options.masks]
        jobs += [("waterfall", model, options.masks[0]) for model in options.waterfall]
        jobs += [("feed", model, "fixed") for model in options.models[:1] if options.feed is not None]
        jobs += [("startup", model, options.masks[0]) for model in options.startup]
        whole = [name for name in names if role(name) != "yardstick"]
        self._show(report.step_table([]))
        self._measure_ceiling()
        for job, model, masks in jobs:
            if time.monotonic() > deadline:
                record["not_run"].append(f"{job} {model} {masks}")
                continue
            with Team(self.device, options.precision, options.batch, model, masks, options.rounds) as team:
                if job == "steps":
                    good &= measure.time_model(team, names, options.batch, record["ceiling_tflop_s"], self._publish)
                elif job == "waterfall":
                    record["waterfall"].append(measure.climb(team))
                    self._show(report.waterfall_table(record["waterfall"][-1]))
                elif job == "feed":
                    record["feed"] += self._feed(team, whole)
                    self._show(report.feed_table(record["feed"]))
                else:
                    record["startup"] += measure.start_up(team, whole)
                    self._show(report.startup_table(record["startup"]))
            if job == "steps":
                self._measure_ceiling()
            self._save()
        if record["not_run"]:
            print(f"not run, out of time: {', '.join(record['not_run'])}", file=sys.stderr)
        self._save()
        return good

    def _feed(self, team: Team, names: list[str]) -> list[Row]:
        root, batch = self.arguments.feed, self.arguments.batch
        size = trainers.configure(team.task["model"], team.task["masks"], team.precision).model.image_size
        with tempfile.TemporaryDirectory(prefix="bench-step-") as work:
            images = lay_out(
                read_jpegs(root, 1000), Path(work), name=Path(root).name, size=size, batch_size=batch, shards=1
            )
            return measure.feed(team, names, images, self.arguments.threads)

    def _measure_ceiling(self) -> None:
        """Measure the best matrix product again: the best of the whole run counts, as a neighbour may slow one look."""
        record = self.record
        found = timing.ceilings(self.device, timing.DTYPES[self.arguments.precision], self.arguments.quick)
        record["ceiling_tflop_s"] = max(record["ceiling_tflop_s"], found.matmul_tflop_s)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        for row in record["rows"]:
            if "tflop_s" in row:
                row["mfu"] = row["tflop_s"] / record["ceiling_tflop_s"]

    def _publish(self, row: Row) -> None:
        self.record["rows"].append(row)
        self._show(report.step_table([row])[-1:])
        self._save()

    def _save(self) -> None:
        arguments, record = self.arguments, self.record
        if arguments.json is not None:
            records.write(arguments.json, json.dumps(record, indent=1) + "\n")
        if arguments.markdown is not None:
            records.write(arguments.markdown, report.markdown(record))
        if arguments.figure is not None and record["waterfall"]:
            records.write(arguments.figure, plots.svg(report.figure(record)))

    @staticmethod
    def _show(lines: list[str]) -> None:
        print("\n".join(lines), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    return parser
