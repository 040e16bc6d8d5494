"""Times operations against their rivals, after their tests have passed:  python -m bench.run NAME [NAME ...]

Each operation's tests run first, in a process of their own; a red operation is not timed. Every result is compared with
the truth before it is timed. What cannot run is listed with its reason. See docs/benchmarks.md for the columns.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bench.cases
from bench import timing
from bench.cases import Case, Variant

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# largest relative error (Frobenius norm) of a result, its inputs rounded to the type, that may be timed
ERROR_LIMITS = {"bf16": 3e-2, "fp16": 1e-2, "fp32": 1e-3}
_GATE_S = 600

Row = dict[str, Any]


def operations() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(bench.cases.__path__)]


def passes_tests(operation: str, seconds: float) -> str | None:
    """None if the operation's tests pass, else the last lines of what they said."""
    module = importlib.import_module(f"bench.cases.{operation}")
    tests = [f"tests/{name}" for name in getattr(module, "TESTS", [f"test_{operation}.py"])]
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-p", "no:cacheprovider", *parallel_tests()]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"its tests took longer than {seconds:.0f} s"
    if done.returncode == 0:
        return None
    return "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])


def parallel_tests() -> list[str]:
    """Arguments that let pytest use a large machine, if pytest-xdist is there."""
    return ["-n", "8"] if importlib.util.find_spec("xdist") and len(os.sched_getaffinity(0)) >= 8 else []


@functools.cache
def environment(device: str) -> Row:
    """What a figure depends on, besides the code."""
    record: Row = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": _nvidia_smi("driver_version"),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": os.environ.get("BENCH_COMMIT") or _commit(),
        "sources": _source_hash(),
    }
    return record


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def _version(module: str) -> str | None:
    try:
        return importlib.import_module(module).__version__
    except ImportError:
        return None


def _commit() -> str | None:
    """The commit of the checkout, "+dirty" if files differ from it; None without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _source_hash() -> str:
    """Tells apart what was timed where there is no commit, or files differ from it."""
    digest = hashlib.sha256()
    for folder, pattern in (("kernels", "*.py"), ("cjepa_fast", "**/*.py"), ("csrc", "**/*"), ("bench", "**/*.py")):
        for path in sorted(path for path in (ROOT / folder).glob(pattern) if path.is_file()):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _nvidia_smi(fields: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def in_fp32(value: Any) -> Any:
    """The same inputs, wider: what the truth is computed from."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().float().requires_grad_(value.requires_grad)
    return type(value)(in_fp32(part) for part in value) if isinstance(value, (tuple, list)) else value


def relative_error(results: Any, truths: Sequence[Tensor]) -> float:
    """Largest ||result - truth|| / ||truth|| over the tensors of a result; infinite where shapes differ."""
    found = [tensor.detach().cpu() if truths[0].is_cpu else tensor.detach() for tensor in timing.tensors(results)]
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in truths]:
        return float("inf")
    errors = [
        (((result.float() - truth).norm() / truth.norm()).item() if truth.any() else result.float().norm().item())
        for result, truth in zip(found, truths, strict=True)
        if truth.numel()
    ]
    # max() would lose a NaN
    return max(errors, default=0.0) if all(error == error for error in errors) else float("nan")


def run_case(
    case: Case, device: str, dtype: str, seconds: float, ceilings: timing.Ceilings, slow_starts: bool = True
) -> list[Row]:  # fmt: skip
    """One row per variant; a variant that cannot run or is wrong has a `status` and `reason` instead of figures."""
    inputs = case.inputs()
    truths = None
    if case.truth is not None:
        truths = [tensor.detach().float() for tensor in timing.tensors(case.truth(*in_fp32(inputs)))]
    limit = ERROR_LIMITS[dtype] if case.error_limit is None else case.error_limit
    rows, runnable = [], {}
    for variant in case.variants:
        row: Row = {"variant": variant.name, "role": variant.role, "status": "ok", "reason": None, "error": None}
        rows.append(row)
        try:
            if variant.obstacle:
                row.update(status="cannot run", reason=variant.obstacle)
                continue
            if variant.slow_start and not slow_starts:
                row.update(status="not run", reason="half the time is spent, and it would take long to start")
                continue
            result = variant.call(*inputs)
            if truths is not None and variant.compared is not None:
                row["error"] = relative_error(variant.compared(result), truths)
                if not row["error"] <= limit:
                    row.update(status="wrong", reason=f"relative error {row['error']:.2g}")
                    continue
            del result
        except Exception as error:  # rivals refuse in many ways; each is named and the rest is timed
            row.update(status="failed" if variant.role == "ours" else "cannot run", reason=first_line(error))
            continue
        runnable[variant.name] = variant
    del truths
    if runnable:
        _time(case, runnable, {row["variant"]: row for row in rows}, inputs, device, seconds, ceilings)
    return rows


def _time(
    case: Case, variants: dict[str, Variant], rows: dict[str, Row], inputs: timing.Inputs, device: str,
    seconds: float, ceilings: timing.Ceilings,
) -> None:  # fmt: skip
    """Adds the figures of the variants to their rows."""
    if device == "cuda":
        for name, variant in variants.items():
            rows[name]["extra_mib"] = timing.extra_memory(variant.call, inputs) / 2**20
    timings = timing.measure(
        {name: variant.call for name, variant in variants.items()},
        timing.cold_sets(inputs, device), device, seconds,
        {name: variant.timed for name, variant in variants.items()},
    )  # fmt: skip
    for name, measured in timings.items():
        rows[name].update(measured._asdict(), **rates(case, measured.median_ms, ceilings))
    compare(list(rows.values()))


def rates(case: Case, milliseconds: float, ceilings: timing.Ceilings) -> Row:
    """What the case's model of bytes and FLOP makes of a time; the larger of its two least times is the ceiling."""
    figures: Row = {}
    if case.items:
        figures["items_per_s"] = case.items / milliseconds * 1e3
    if case.bytes:
        figures["gb_s"] = case.bytes / milliseconds * 1e-6
    if case.flop:
        figures["tflop_s"] = case.flop / milliseconds * 1e-9
    least_ms = {
        "memory": case.bytes / ceilings.copy_gb_s * 1e-6,
        "matrix": case.flop / ceilings.matmul_tflop_s * 1e-9,
    }
    limit = max(least_ms, key=lambda name: least_ms[name])
    if least_ms[limit] > 0:
        figures |= {
            "limit": limit,
            "floor_ms": least_ms[limit],
            "percent_of_ceiling": 100 * least_ms[limit] / milliseconds,
        }
    return figures


def compare(rows: list[Row]) -> None:
    """Adds how many times as fast as the best rival each row is, and its time and memory over the yardstick's."""
    timed = [row for row in rows if "median_ms" in row]
    rivals = [row["median_ms"] for row in timed if row["role"] == "rival"]
    yardstick = next((row for row in timed if row["role"] == "yardstick"), None)
    for row in timed:
        if rivals and row["role"] != "yardstick":
            row["speedup_over_best_rival"] = min(rivals) / row["median_ms"]
        if yardstick is not None:
            row["time_over_yardstick"] = row["median_ms"] / yardstick["median_ms"]
            if yardstick.get("extra_mib"):
                row["memory_over_yardstick"] = row["extra_mib"] / yardstick["extra_mib"]


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def run_operation(
    operation: str, device: str, dtype: str, *, quick: bool, deadline: float, stamp: Row, publish: Callable[[Row], None]
) -> bool:
    """Times every case of an operation until the deadline; False if one of ours could not run or was wrong."""
    module = importlib.import_module(f"bench.cases.{operation}")
    dtype = getattr(module, "DTYPE", dtype)
    kind = DTYPES.get(dtype, torch.float32)
    cases = list(module.cases(device, kind, quick))
    ceilings = timing.ceilings(device, kind, quick)
    common = {"op": operation, "device": device, "dtype": dtype, "quick": quick, **stamp}
    ceiling = {**common, "case": "ceiling", "direction": "", "role": None, "status": "ok", "reason": None}
    publish({**ceiling, "variant": "copy", "gb_s": ceilings.copy_gb_s})
    publish({**ceiling, "variant": "matmul", "tflop_s": ceilings.matmul_tflop_s})
    good, half_time = True, (time.monotonic() + deadline) / 2
    while cases:
        case = cases.pop(0)  # and with it what its variants hold
        about = {"case": case.name, "direction": case.direction, "item": case.item or None}
        about |= {"bytes": case.bytes or None, "flop": case.flop or None}
        if time.monotonic() > deadline:
            publish({**common, **about, "variant": None, "status": "not run", "reason": "out of time"})
            continue
        try:
            slow_starts = time.monotonic() < half_time
            rows = run_case(case, device, dtype, 0.05 if quick else 0.3, ceilings, slow_starts)
        except Exception as error:
            rows = [{"variant": None, "role": "ours", "status": "failed", "reason": first_line(error)}]
        clocks = _nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")
        for row in rows:
            publish({**common, **about, **row, "clocks_mhz_w_c": clocks})
            good &= row["role"] != "ours" or row["status"] in ("ok", "cannot run")
        del case, rows
        torch.compiler.reset()  # beyond eight shapes of one function it would quietly run uncompiled
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return good


def markdown(rows: Sequence[Row]) -> str:
    """A section per operation: its environment in one line, then a table."""
    parts = []
    for operation in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == operation]
        parts.append(f"## {operation}\n\n{where(own)}\n")
        header = ["case", "variant", "median [p20, p80] us", "GB/s", "TFLOP/s", "% of ceiling", "x best rival",
                  "extra MiB", "host us", "error", "note"]  # fmt: skip
        parts.append(" | ".join(["", *header, ""]).strip() + "\n" + "|" + " --- |" * len(header))
        parts[-1] += "".join(f"\n{_table_line(row)}" for row in own if row["case"] != "ceiling") + "\n"
    return "\n".join(parts)


def where(rows: Sequence[Row]) -> str:
    """What the rows were measured on and with, in a line."""
    row = rows[0]
    ceilings = ", ".join(
        f"{r['variant']} {r.get('gb_s', r.get('tflop_s')):.3g} {'GB/s' if 'gb_s' in r else 'TFLOP/s'}"
        for r in rows
        if r["case"] == "ceiling"
    )
    ceilings = f" Ceilings: {ceilings}." if ceilings else ""
    machine = row["gpu"] or f"CPU only: {row['cpu']}, {row['threads']} threads"
    software = ", ".join(f"{name} {row[name]}" for name in ("driver", "cuda", "torch", "triton", "python") if row[name])
    warnings = "" if row["gated"] else " **Not gated: its tests were not run.**"
    warnings += " **Rehearsal: the figures mean nothing.**" if row["rehearsal"] else ""
    warnings += " Small sizes (--quick)." if row["quick"] else ""
    commit = f"commit {row['commit'] or 'unknown'}, sources {row['sources']}"
    return f"{machine}; {row['dtype']}; {software}; {commit}; {row['date']}.{ceilings}{warnings}"


def _table_line(row: Row) -> str:
    def number(key: str, spec: str = "", scale: float = 1.0) -> str:
        if row.get(key) is None:
            return ""
        value = scale * row[key]
        return format(value, spec or (",.0f" if value >= 100 else ".3g"))

    time_us = ""
    if "median_ms" in row:
        median, p20, p80 = (number(key, scale=1e3) for key in ("median_ms", "p20_ms", "p80_ms"))
        time_us = f"{median} [{p20}, {p80}]"
    notes = [] if row["status"] == "ok" else [row["status"] + (f": {row['reason']}" if row["reason"] else "")]
    if row.get("items_per_s"):
        notes.append(f"{number('items_per_s')} {row['item']}/s")
    if row.get("time_over_yardstick") and row["role"] != "yardstick":
        memory = f", memory x {row['memory_over_yardstick']:.2f}" if row.get("memory_over_yardstick") else ""
        notes.append(f"time x {row['time_over_yardstick']:.2f}{memory} of the yardstick")
    if row.get("method") == "queue":
        notes.append("starved by the host" if row["starved"] else "not captured")
    cells = [
        f"{row['case']} {row['direction']}".strip(), f"**{row['variant']}**" if row.get("role") == "ours" else
        row["variant"] or "", time_us, number("gb_s"), number("tflop_s"), number("percent_of_ceiling", ".0f"),
        number("speedup_over_best_rival", ".2f"), number("extra_mib"), number("host_us"), number("error", ".1g"),
        "; ".join(notes).replace("|", "/"),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one of: {', '.join(operations())}")
    parser.add_argument("--json", type=Path, help="append one JSON object a line, as results come")
    parser.add_argument("--markdown", type=Path, help="write tables")
    parser.add_argument("--quick", action="store_true", help="small sizes, short measurements")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new case after this [no limit]")
    parser.add_argument("--dtype", choices=DTYPES, help="[bf16 on a GPU, fp32 on a CPU]")
    parser.add_argument("--no-gate", action="store_true", help="skip the tests; marks every row gated=false")
    parser.add_argument("--rehearsal", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in operations()]:
        parser.error(f"unknown operation {unknown[0]!r}; known: {', '.join(operations())}")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: the interpreter is never timed; unset it")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = arguments.dtype or ("bf16" if device == "cuda" else "fp32")
    rows: list[Row] = []

    def publish(row: Row) -> None:
        rows.append(row)
        if arguments.json is not None:
            with arguments.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if row["case"] != "ceiling":
            print(_table_line(row), flush=True)

    good = True
    for name in arguments.names:
        start = time.monotonic()
        if not arguments.no_gate and (said := passes_tests(name, min(_GATE_S, arguments.seconds))):
            print(f"{said}\n{name}: its tests have not passed, so it is not timed", file=sys.stderr)
            good = False
            continue
        stamp = {
            **environment(device), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "gated": not arguments.no_gate, "rehearsal": arguments.rehearsal,
        }  # fmt: skip
        good &= run_operation(
            name, device, dtype, quick=arguments.quick, deadline=start + arguments.seconds, stamp=stamp, publish=publish
        )
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(rows))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
