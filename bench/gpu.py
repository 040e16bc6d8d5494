"""All measurements that need a GPU, in one command with a limit of time:  python -m bench.gpu --out DIR --minutes 9

Sections: the machine, the tests that need a GPU, whole steps beside reference trainers, the operations against their
rivals, the feed against its rivals, a short real training, the compile report for this GPU.
Each is a process of its own with a share of the time; unused time goes to later sections. A section that fails or runs
out of time is recorded and does not stop the rest. DIR is written as results come, as the machine may vanish:

    results.md     the report to read        results.json   the sections, and the attention table
    bench.jsonl    rows of bench.run         compile.jsonl  rows of bench.compile_report
    data.jsonl     rows of bench.data        step.json      the record of bench.step
    train.json     figures of a short run    log.txt        all output, nvidia-smi and pip first

The feed and the training need DALI, and take their images from $BENCH_IMAGENET and $BENCH_CIFAR or make some.
Runs from a plain checkout. Exit code 1 if a section failed or was not finished, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import records, short_run
from bench.feed import report as feed_report
from bench.ops import report as ops_report
from bench.ops import run
from bench.step import report as step_report
from cjepa_fast.ops._attention_choice import BACKENDS, TOKENS

# the most important first; an operation's tests run within its section
SHARES = {
    "attention": 10,
    "prediction_loss": 4,
    "adamw_ema": 5,
    "token_gather": 5,
    "variance_covariance": 6,
    "masks": 4,
}
_LEAST_S = 10  # a section needs this to do more than start


def sections(out: Path, rehearsal: bool) -> dict[str, tuple[float, list[str]]]:
    """Return the share of the time and the command of each section; `{seconds}` stands for the section's limit."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    arch = "90" if rehearsal else "".join(map(str, torch.cuda.get_device_capability()))
    extra = ["--quick", "--rehearsal"] if rehearsal else []
    step = (
        ["--quick", "--rehearsal", "--no-gate", "--waterfall", "tiny"]
        if rehearsal
        else ["--waterfall", "S", "--startup", "L"]
    )
    timed = [name for name in SHARES if name in run.operations()]
    timed += [name for name in run.operations() if name not in SHARES]
    return {
        "machine": (2, [python, "-m", "bench.gpu", "--describe-machine"]),
        "tests": (8, [*tests, *run.parallel_tests()]),
        "bench step": (20, [
            python, "-m", "bench.step", "--seconds", "{seconds}", "--json", str(out / "step.json"), *step
        ]),
        **{
            f"bench {name}": (SHARES.get(name, 4), [
                python, "-m", "bench.run", name, "--seconds", "{seconds}", "--json", str(out / "bench.jsonl"), *extra
            ])
            for name in timed
        },
        # uncompiled: compiling the steps would take all of the time
        "bench data": (8, [
            python, "-m", "bench.data", "--seconds", "{seconds}", "--json", str(out / "data.jsonl"), "--compile", "off",
            "--rounds", "3", "--window", "0.5", *extra,
        ]),
        "training": (6, [
            python, "-m", "bench.short_run", "--json", str(out / "train.json"), "--steps", "10" if rehearsal else "600"
        ]),
        "compile report": (5, [
            python, "-m", "bench.compile_report", "--arch", arch, "--json", str(out / "compile.jsonl")
        ]),
    }  # fmt: skip


def run_section(command: list[str], limit: float, log: Path) -> tuple[str, int | None]:
    """Run a command, its output appended to `log`; return its status (ok, failed, out of time) and exit code."""
    with log.open("ab") as output:
        output.write(f"\n$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, cwd=records.ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return "out of time", None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers, too, also after Ctrl-C
            process.wait()
    return ("ok" if code == 0 else "failed"), code


def describe_machine() -> int:
    """Print the driver, the processor and the installed packages."""
    commands = (["nvidia-smi"], ["nvidia-smi", "-q"], ["nvcc", "--version"], ["lscpu"], ["uname", "-a"],
                [sys.executable, "--version"], [sys.executable, "-m", "pip", "list"])  # fmt: skip
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            said = done.stdout + done.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            said = f"{error}\n"
        print(f"$ {shlex.join(command)}\n{said}")
    return 0


def attention_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return rows for MEASURED in cjepa_fast/ops/_attention_choice.py: backends by time forward and backward."""
    points: dict[tuple[str, int, int], list[tuple[float, str]]] = {}
    for row in rows:
        shape = re.match(r"(?:context|predictor|target) \w+ n=(\d+) d=(\d+) ", row["case"])
        timed = row["op"] == "attention" and row["direction"] == "fwd+bwd" and row.get("median_ms")
        if timed and shape and row["gpu"] and row["variant"] in BACKENDS:
            point = (row["gpu"], int(shape[1]), int(shape[2]))
            points.setdefault(point, []).append((row["median_ms"], row["variant"]))
    lines = []
    for gpu in dict.fromkeys(gpu for gpu, *_ in points):
        lines.append(f'"{gpu}": {{')
        for (name, tokens, width), timed in sorted(points.items()):
            if name == gpu:
                bucket = next(limit for limit in TOKENS if tokens <= limit)
                order = ", ".join(f'"{variant}"' for _, variant in sorted(timed))
                times = ", ".join(f"{1e3 * milliseconds:.0f}" for milliseconds, _ in sorted(timed))
                lines.append(f"    ({bucket}, {width}): ({order},),  # {tokens} tokens: {times} us")
        lines.append("},")
    return lines


def write_report(out: Path, record: dict[str, Any]) -> None:
    """Write results.json and results.md from all that has been measured so far."""
    rows = records.read(out / "bench.jsonl")
    record["attention"] = attention_table(rows)
    records.write(out / "results.json", json.dumps(record, indent=1) + "\n")
    title = "Rehearsal on a CPU: a trial of the flow, the figures mean nothing" if record["rehearsal"] else "GPU"
    lines = []
    for section in record["sections"]:
        spent = [f"{section[key]:.0f}" if section.get(key) else "" for key in ("seconds", "limit")]
        lines.append([section["name"], section["status"], *spent])
    text = [f"# {title}\n", *records.table("section|status|seconds|limit", lines)]
    if record["attention"]:
        text.append(
            "\nFor MEASURED in cjepa_fast/ops/_attention_choice.py:\n\n```python\n"
            + "\n".join(record["attention"])
            + "\n```"
        )
    parts = ["\n".join(text) + "\n"]
    if (out / "step.json").exists():
        parts.append(step_report.markdown(json.loads((out / "step.json").read_text())))
    parts += [ops_report.markdown(rows), feed_report.markdown(records.read(out / "data.jsonl"))]
    if (out / "train.json").exists():
        parts.append(short_run.markdown(json.loads((out / "train.json").read_text())))
    records.write(out / "results.md", "\n".join(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results; must not exist or be empty")
    parser.add_argument("--minutes", type=float, default=9.0, help="everything ends within this [9]")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections alone, e.g. --only 'bench masks'")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="try the whole flow on a CPU with small sizes")
    parser.add_argument("--describe-machine", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.describe_machine:
        return describe_machine()
    if not arguments.cpu_rehearsal and not torch.cuda.is_available():
        print("error: no GPU is visible to torch; --cpu-rehearsal runs the flow without one", file=sys.stderr)
        return 2
    if arguments.cpu_rehearsal and torch.cuda.is_available():
        print("error: there is a GPU; a rehearsal is for machines without one", file=sys.stderr)
        return 2
    if arguments.out is None:
        parser.error("--out DIR is required")
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"--out {arguments.out} holds files already: figures of two runs must not mix")

    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes - 5  # seconds for the reports
    plan = sections(out, arguments.cpu_rehearsal)
    if arguments.only and (unknown := [name for name in arguments.only if name not in plan]):
        parser.error(f"unknown section {unknown[0]!r}; known: {', '.join(plan)}")
    wanted = {name: plan[name] for name in plan if not arguments.only or name in arguments.only}
    record: dict[str, Any] = {
        "rehearsal": arguments.cpu_rehearsal,
        "environment": records.environment("cpu" if arguments.cpu_rehearsal else "cuda"),
        "sections": [{"name": name, "status": "not run"} for name in wanted],
    }
    for index, (name, (share, command)) in enumerate(wanted.items()):
        section = record["sections"][index]
        left = deadline - time.monotonic()
        limit = left * share / sum(other for other, _ in list(wanted.values())[index:])
        if limit < _LEAST_S:
            continue
        command = [part.replace("{seconds}", f"{0.85 * limit:.0f}") for part in command]
        section.update(status="running", limit=limit)
        write_report(out, record)
        print(f"{name}: at most {limit:.0f} s", flush=True)
        start = time.monotonic()
        section["status"], section["exit_code"] = run_section(command, limit, out / "log.txt")
        section["seconds"] = time.monotonic() - start
        print(f"{name}: {section['status']} after {section['seconds']:.0f} s", flush=True)
        write_report(out, record)
    print((out / "results.md").read_text())
    return 0 if all(section["status"] == "ok" for section in record["sections"]) else 1


if __name__ == "__main__":
    sys.exit(main())
