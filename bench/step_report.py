"""What `bench.step` makes of its measurements: figures, tables, drawings of waterfalls. Arithmetic and text alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

Row = dict[str, Any]

PHASES = ("target", "context", "predictor", "loss", "backward", "optimizer+EMA")
BASES = ("eager", "tuned")  # what speed-ups are taken over


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and 20th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), p20, p80


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of their time over ours in the same round, so that what slows a round slows both."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def figures(
    times: Mapping[str, Sequence[float]], batch: int, gflop_per_image: float, ceiling_tflop_s: float
) -> dict[str, Row]:
    """Figures of each trainer from its milliseconds a step, round by round.

    Model FLOP utilisation counts the method's floating-point operations, whatever an implementation does or saves, over
    the best matrix product that this device showed in the same run.
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
    """The part of each phase in the time of all."""
    total = sum(phases.values())
    return {name: milliseconds / total for name, milliseconds in phases.items()}


def waterfall(rungs: Sequence[Row], pairs: Mapping[tuple[int, int], tuple[Sequence[float], Sequence[float]]]) -> None:
    """Adds to each rung its `factor` over the last rung before it that ran, and the `total` over the first.

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
    """The tables of a record of `bench.step`."""
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
    warnings = "" if record["gated"] else " **Not gated: the trainers were not compared before.**"
    warnings += " **Rehearsal: the figures mean nothing.**" if record["rehearsal"] else ""
    return (
        f"{where}; {record['precision']}, batch {record['batch']}; {software}; commit {environment['commit']}; "
        f"{record['date']}. Best matrix product: {record['ceiling_tflop_s']:.3g} TFLOP/s.{warnings}"
    )


def step_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| model | masks | trainer | images/s | ms a step [p20, p80] | x eager | x tuned | MFU % | peak MiB | note |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for row in rows:
        name = f"**{row['rival']}**" if row["rival"].startswith("ours") else row["rival"]
        start = f"| {row['model']} | {row['masks']} | {name} | "
        if row["status"] != "ok":
            lines.append(start + f"| | | | | | {row['status']}: {cell(row['reason'])} |")
            continue
        faster = [f"{row['speedup'][base]:.2f}" if base in row["speedup"] else "" for base in BASES]
        if row["role"] == "yardstick":
            faster = ["", ""]
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        note = "encoder alone, less work than a step" if row["role"] == "yardstick" else row["note"] or ""
        mfu = "" if row["role"] == "yardstick" else f"{100 * row['mfu']:.0f}"
        lines.append(
            f"{start}{row['images_s']:,.4g} | {row['median_ms']:,.4g} [{row['p20_ms']:,.4g}, {row['p80_ms']:,.4g}] | "
            f"{faster[0]} | {faster[1]} | {mfu} | {peak} | {cell(note)} |"
        )
    return lines


def phase_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "Phases in ms and share, timed apart with a wait for the device at the end of each, so that their sum exceeds "
        "the step above:",
        "",
        "| model | masks | trainer | " + " | ".join(PHASES) + " |",
        "| --- | --- | --- |" + " --: |" * len(PHASES),
    ]
    for row in rows:
        if phases := row.get("phases"):
            part = shares(phases)
            cells = [f"{phases[name]:,.3g} ({part[name]:.0%})" if name in phases else "" for name in PHASES]
            lines.append(f"| {row['model']} | {row['masks']} | {row['rival']} | " + " | ".join(cells) + " |")
    return lines


def waterfall_table(fall: Row) -> list[str]:
    lines = [
        f"What each win adds to {fall['model']}, {fall['masks']} masks; a rung takes turns with the one before it:",
        "",
        "| what changes | trainer | x the rung before | x the first |",
        "| --- | --- | --: | --: |",
    ]
    for rung in fall["rungs"]:
        if rung["status"] == "ok":
            factor = f"{rung['factor']:.3f}" if "factor" in rung else ""
            lines.append(f"| {rung['label']} | `{rung['rival']}` | {factor} | {rung['total']:.2f} |")
        else:
            lines.append(f"| {rung['label']} | `{rung['rival']}` | {rung['status']}: {cell(rung['reason'])} | |")
    if fall["direct"] is not None:
        lines.append(f"| the last beside the first, one pair | | | {fall['direct']:.2f} |")
    return lines


def startup_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "Seconds from the start of a fresh process to the end of its first step, `import torch` included:",
        "",
        "| model | trainer | empty compile cache | warm | peak MiB |",
        "| --- | --- | --: | --: | --: |",
    ]
    for row in rows:
        if row["status"] == "ok":
            peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
            lines.append(f"| {row['model']} | {row['rival']} | {row['cold_s']:.1f} | {row['warm_s']:.1f} | {peak} |")
        else:
            lines.append(f"| {row['model']} | {row['rival']} | {row['status']}: {cell(row['reason'])} | | |")
    return lines


def feed_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "With images read and decoded while the step runs, and masks drawn as each trainer draws them (`tuned` gets "
        "ours):",
        "",
        "| model | trainer | reads with | images/s | x eager | x tuned | ms a step | of it wait for data | "
        "masks, us an image |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        if row["status"] == "ok":
            faster = " | ".join(f"{row['speedup'][base]:.2f}" if base in row["speedup"] else "" for base in BASES)
            lines.append(
                f"| {row['model']} | {row['rival']} | {row['note']} | {row['images_s']:,.4g} | {faster} | "
                f"{row['median_ms']:,.4g} | "
                f"{row['wait_ms']:,.3g} ({row['wait_ms'] / row['median_ms']:.0%}) | {row['mask_us']:.3g} |"
            )
        else:
            lines.append(f"| {row['model']} | {row['rival']} | {row['status']}: {cell(row['reason'])} |" + " |" * 6)
    return lines


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def figure(falls: Sequence[Row], title: str) -> str:
    """Waterfalls as an SVG drawing: a bar from the total before a rung to the total with it."""
    bar, left, wide, right = 26, 330, 420, 150
    parts: list[str] = []
    y = 44
    for fall in falls:
        rungs = [rung for rung in fall["rungs"] if rung["status"] == "ok"]
        longest = max((rung["total"] for rung in rungs), default=1.0)
        scale = wide / longest
        parts.append(
            text_element(8, y, f"ViT-{fall['model']}, {fall['masks']} masks: speed over the first", weight="bold")
        )
        y += 12
        before = 0.0
        for rung in rungs:
            low, high = sorted((before, rung["total"]))
            colour = "#b0b7c3" if before == 0.0 else "#2f7d4f" if rung["total"] >= before else "#b5482f"
            parts.append(text_element(left - 8, y + 17, rung["label"], anchor="end"))
            parts.append(
                f'<rect x="{left + low * scale:.1f}" y="{y + 4}" width="{max(1.0, (high - low) * scale):.1f}" '
                f'height="{bar - 8}" fill="{colour}"/>'
            )
            said = f"{rung['total']:.2f}x" + (f"  (x{rung['factor']:.2f})" if "factor" in rung else "")
            parts.append(text_element(left + high * scale + 8, y + 17, said))
            before = rung["total"]
            y += bar
        y += 34
    body = "\n".join(parts)
    width = left + wide + right
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="{width}" height="{y}" fill="#ffffff"/>\n'
        f"{text_element(8, 20, title)}\n{body}\n</svg>\n"
    )


def text_element(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
