"""Figures, tables and the drawing that `bench.step` makes of its measurements."""

from __future__ import annotations

import itertools
import statistics
import typing
from collections.abc import Mapping, Sequence

from bench import plots
from bench.records import Row, problem, table

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASES = ("target", "context", "predictor", "loss", "backward", "optimizer+EMA")
BASES = ("eager", "tuned")  # the trainers that speed-ups are taken over


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the 20th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), p20, p80


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median over rounds of their time over ours: a slow round slows both."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def figures(
    times: Mapping[str, Sequence[float]], batch: int, gflop_per_image: float, ceiling_tflop_s: float
) -> dict[str, Row]:
    """Return the figures of each trainer from its milliseconds a step, round by round.

    `mfu`: the method's FLOP per second over the best matrix product of this device in the same run.
    """
    found: dict[str, Row] = {}
    for name, milliseconds in times.items():
        median, p20, p80 = quantiles(milliseconds)
        tflop_s = gflop_per_image * batch / median
        found[name] = {
            "median_ms": median, "p20_ms": p20, "p80_ms": p80, "rounds": len(milliseconds),
            "images_s": batch / median * 1e3, "tflop_s": tflop_s, "mfu": tflop_s / ceiling_tflop_s,
            "speedup": {base: speedup(milliseconds, times[base]) for base in BASES if base in times and base != name},
        }  # fmt: skip
    return found


def shares(phases: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each phase in the time of all."""
    total = sum(phases.values())
    return {name: milliseconds / total for name, milliseconds in phases.items()}


def waterfall(rungs: Sequence[Row], pairs: Mapping[tuple[int, int], tuple[Sequence[float], Sequence[float]]]) -> None:
    """Add to each rung its `factor` over the last rung before it that ran, and its `total` over the first.

    Args:
        pairs: for two rungs that took turns, the milliseconds a step of the earlier and of the later.
    """
    total, last = 1.0, None
    for index, rung in enumerate(rungs):
        if rung["status"] != "ok":
            continue
        if last is not None:
            earlier, later = pairs[last, index]
            rung["factor"] = speedup(later, earlier)
            rung["median_ms"] = statistics.median(later)
            total *= rung["factor"]
        rung["total"], last = total, index


def markdown(record: Row) -> str:
    """Return the tables of a record of `bench.step`."""
    text = [caption(record), ""]
    if record["rows"]:
        text += [*step_table(record["rows"]), "", *phase_table(record["rows"]), ""]
    for fall in record["waterfall"]:
        text += [*waterfall_table(fall), ""]
    if record["startup"]:
        text += [*startup_table(record["startup"]), ""]
    if record["feed"]:
        text += [*feed_table(record["feed"]), ""]
    return "\n".join(text)


def caption(record: Row) -> str:
    environment = record["environment"]
    where = environment["gpu"] or f"CPU: {environment['cpu']}, {environment['threads']} threads"
    software = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "cuda") if environment[name])
    warnings = "" if record["gated"] else " **Not gated: the trainers were not compared before the timing.**"
    warnings += " **Rehearsal: the figures mean nothing.**" if record["rehearsal"] else ""
    return (
        f"{where}; {record['precision']}, batch {record['batch']}; {software}; commit {environment['commit']}; "
        f"{record['date']}. Best matrix product: {record['ceiling_tflop_s']:.3g} TFLOP/s.{warnings}"
    )


def step_table(rows: Sequence[Row]) -> list[str]:
    columns = "model|masks|trainer|>images/s|>ms a step [p20, p80]|>x eager|>x tuned|>MFU %|>peak MiB|note"
    return table(columns, map(_step, rows))


def _step(row: Row) -> list[str]:
    start = [row["model"], row["masks"], f"**{row['rival']}**" if row["rival"].startswith("ours") else row["rival"]]
    if row["status"] != "ok":
        return [*start, problem(row)]
    start += [f"{row['images_s']:,.4g}", f"{row['median_ms']:,.4g} [{row['p20_ms']:,.4g}, {row['p80_ms']:,.4g}]"]
    if row["role"] == "yardstick":
        return [*start, "", "", "", _peak(row), "encoder alone, less work than a step"]
    return [*start, *_speedups(row), f"{100 * row['mfu']:.0f}", _peak(row), row["note"] or ""]


def _speedups(row: Row) -> list[str]:
    return [f"{row['speedup'][base]:.2f}" if base in row["speedup"] else "" for base in BASES]


def _peak(row: Row) -> str:
    return "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"


def phase_table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if phases := row.get("phases"):
            part = shares(phases)
            cells = [f"{phases[name]:,.3g} ({part[name]:.0%})" if name in phases else "" for name in PHASES]
            lines.append([row["model"], row["masks"], row["rival"], *cells])
    head = "Phases in ms and share. Each ends with a wait for the device, so their sum exceeds the step above:"
    return [head, "", *table("|>".join(["model|masks|trainer", *PHASES]), lines)]


def waterfall_table(fall: Row) -> list[str]:
    lines = []
    for rung in fall["rungs"]:
        factor = f"{rung['factor']:.3f}" if "factor" in rung else ""
        ran = [factor, f"{rung['total']:.2f}"] if rung["status"] == "ok" else [problem(rung)]
        lines.append([rung["label"], f"`{rung['rival']}`", *ran])
    if fall["direct"] is not None:
        lines.append(["the last beside the first, one pair", f"{fall['direct']:.2f}"])
    head = f"The waterfall of {fall['model']}, {fall['masks']} masks; a rung takes turns with the one before it:"
    return [head, "", *table("what changes|trainer|>x the rung before|>x the first", lines)]


def startup_table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        ran = row["status"] == "ok"
        cells = [f"{row['cold_s']:.1f}", f"{row['warm_s']:.1f}", _peak(row)] if ran else [problem(row)]
        lines.append([row["model"], row["rival"], *cells])
    head = "Seconds from the start of a fresh process to the end of its first step, `import torch` included:"
    return [head, "", *table("model|trainer|>empty compile cache|>warm|>peak MiB", lines)]


def feed_table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        start = [row["model"], row["rival"]]
        if row["status"] != "ok":
            lines.append([*start, problem(row)])
            continue
        wait = f"{row['wait_ms']:,.3g} ({row['wait_ms'] / row['median_ms']:.0%})"
        cells = [f"{row['images_s']:,.4g}", *_speedups(row), f"{row['median_ms']:,.4g}", wait, f"{row['mask_us']:.3g}"]
        lines.append([*start, row["note"], *cells])
    columns = "model|trainer|decoder|>images/s|>x eager|>x tuned|>ms a step|>of it wait for data|>masks, us an image"
    return ["Steps fed from JPEGs; each trainer draws its own masks (`tuned` draws ours):", "", *table(columns, lines)]


def figure(record: Row) -> Figure:
    """Draw the waterfalls of a record: a bar from the total before a rung to the total with it."""
    ran = [(fall, [rung for rung in fall["rungs"] if rung["status"] == "ok"]) for fall in record["waterfall"]]
    falls = [(fall, rungs) for fall, rungs in ran if rungs]
    drawing = plots.new(9, 0.6 + sum(0.7 + 0.26 * len(rungs) for _, rungs in falls))
    where = record["environment"]["gpu"] or record["environment"]["cpu"]
    drawing.suptitle(f"{where}, {record['precision']}, batch {record['batch']}", fontsize=11)
    if not falls:
        return drawing
    grid = drawing.subplots(len(falls), 1, squeeze=False, height_ratios=[len(rungs) for _, rungs in falls])
    for axis, (fall, rungs) in zip(grid[:, 0], falls, strict=True):
        totals = [rung["total"] for rung in rungs]
        before = [0.0, *totals[:-1]]
        colours = ["#b0b7c3", *("#2f7d4f" if b >= a else "#b5482f" for a, b in itertools.pairwise(totals))]
        widths = [total - start for total, start in zip(totals, before, strict=True)]
        axis.barh([rung["label"] for rung in rungs], widths, left=before, color=colours)
        for index, rung in enumerate(rungs):
            text = f"{rung['total']:.2f}x" + (f"  (x{rung['factor']:.2f})" if "factor" in rung else "")
            axis.text(max(totals[index], before[index]), index, f" {text}", va="center", fontsize=9)
        axis.set_title(f"ViT-{fall['model']}, {fall['masks']} masks", fontsize=10)
        axis.set_xlabel("speed over the first")
        axis.set_xlim(0, 1.25 * max(totals))
        axis.invert_yaxis()
    return drawing
