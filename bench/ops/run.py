"""Times operations against their rivals, after their tests have passed:  python -m bench.run NAME [NAME ...]

Each operation's tests run first, in a process of their own; an operation that fails them is not timed. Every result is
compared with the truth before it is timed. A variant that cannot run is listed with its reason. See docs/benchmarks.md
for the columns.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bench.ops.cases
from bench import records, timing
from bench.ops import report
from bench.ops.cases import Case, Variant
from bench.records import ROOT, Row, first_line

# largest relative error (Frobenius norm) of a result, its inputs rounded to the type, that may be timed
ERROR_LIMITS = {"bf16": 3e-2, "fp16": 1e-2, "fp32": 1e-3}
_GATE_S = 600


def operations() -> list[str]:
    """List the names of all operations that can be timed."""
    return [module.name for module in pkgutil.iter_modules(bench.ops.cases.__path__)]


def passes_tests(operation: str, seconds: float) -> str | None:
    """Run an operation's tests; return None if they pass, else the last lines that pytest printed."""
    module = importlib.import_module(f"bench.ops.cases.{operation}")
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
    """Return the arguments that let pytest use a large machine, if pytest-xdist is installed."""
    return ["-n", "8"] if importlib.util.find_spec("xdist") and len(os.sched_getaffinity(0)) >= 8 else []


def in_fp32(value: Any) -> Any:
    """Return the inputs in fp32, for the truth."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().float().requires_grad_(value.requires_grad)
    return type(value)(in_fp32(part) for part in value) if isinstance(value, (tuple, list)) else value


def relative_error(results: Any, truths: Sequence[Tensor]) -> float:
    """Return the largest ||result - truth|| / ||truth|| over the tensors of a result; infinity where shapes differ."""
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
    """Return a row for each variant; one that cannot run or is wrong has a `status` and `reason` instead of figures."""
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
    """Add the figures of the variants to their rows."""
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
    """Return rates from the bytes and FLOP of a case; the larger of its two least times is the ceiling."""
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
    """Add to each row its speed over the best rival's, and its time and memory over the yardstick's."""
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


def run_operation(
    operation: str, device: str, dtype: str, *, quick: bool, deadline: float, stamp: Row, publish: Callable[[Row], None]
) -> bool:
    """Time every case of an operation until the deadline; return False if one of ours failed or was wrong."""
    module = importlib.import_module(f"bench.ops.cases.{operation}")
    dtype = getattr(module, "DTYPE", dtype)
    kind = timing.DTYPES.get(dtype, torch.float32)
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
        clocks = records.nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")
        for row in rows:
            publish({**common, **about, **row, "clocks_mhz_w_c": clocks})
            good &= row["role"] != "ours" or row["status"] in ("ok", "cannot run")
        del case, rows
        torch.compiler.reset()  # beyond eight shapes of one function it would quietly run uncompiled
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one of: {', '.join(operations())}")
    parser.add_argument("--json", type=Path, help="append one JSON object a line, as results come")
    parser.add_argument("--markdown", type=Path, help="write tables")
    parser.add_argument("--quick", action="store_true", help="small sizes, short measurements")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new case after this [no limit]")
    parser.add_argument("--dtype", choices=timing.DTYPES, help="[bf16 on a GPU, fp32 on a CPU]")
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
        records.append(arguments.json, row)
        if row["case"] != "ceiling":
            print(report.operation_table([row])[-1], flush=True)

    good = True
    for name in arguments.names:
        start = time.monotonic()
        if not arguments.no_gate and (said := passes_tests(name, min(_GATE_S, arguments.seconds))):
            print(f"{said}\n{name}: its tests have not passed, so it is not timed", file=sys.stderr)
            good = False
            continue
        stamp = {
            **records.environment(device), "date": records.now(), "gated": not arguments.no_gate,
            "rehearsal": arguments.rehearsal,
        }  # fmt: skip
        good &= run_operation(
            name, device, dtype, quick=arguments.quick, deadline=start + arguments.seconds, stamp=stamp, publish=publish
        )
    if arguments.markdown is not None:
        arguments.markdown.write_text(report.markdown(rows))
    return 0 if good else 1
