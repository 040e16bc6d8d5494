"""Markdown tables of the rows that `bench.run` writes."""

from __future__ import annotations

from collections.abc import Sequence

from bench.records import Row, problem, table


def markdown(rows: Sequence[Row]) -> str:
    """Return a section per operation: its environment in one line, then a table."""
    parts = []
    for operation in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == operation]
        parts.append("\n".join([f"## {operation}\n\n{where(own)}\n", *operation_table(own)]) + "\n")
    return "\n".join(parts)


def where(rows: Sequence[Row]) -> str:
    """Return the machine and the versions of the rows in one line."""
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


def operation_table(rows: Sequence[Row]) -> list[str]:
    columns = "case|variant|median [p20, p80] us|GB/s|TFLOP/s|% of ceiling|x best rival|extra MiB|host us|error|note"
    return table(columns, (_cells(row) for row in rows if row["case"] != "ceiling"))


def _cells(row: Row) -> list[str]:
    def number(key: str, spec: str = "", scale: float = 1.0) -> str:
        if row.get(key) is None:
            return ""
        value = scale * row[key]
        return format(value, spec or (",.0f" if value >= 100 else ".3g"))

    time_us = ""
    if "median_ms" in row:
        median, p20, p80 = (number(key, scale=1e3) for key in ("median_ms", "p20_ms", "p80_ms"))
        time_us = f"{median} [{p20}, {p80}]"
    notes = [] if row["status"] == "ok" else [problem(row)]
    if row.get("items_per_s"):
        notes.append(f"{number('items_per_s')} {row['item']}/s")
    if row.get("time_over_yardstick") and row["role"] != "yardstick":
        memory = f", memory x {row['memory_over_yardstick']:.2f}" if row.get("memory_over_yardstick") else ""
        notes.append(f"time x {row['time_over_yardstick']:.2f}{memory} of the yardstick")
    if row.get("method") == "queue":
        notes.append("starved by the host" if row["starved"] else "not captured")
    name = f"**{row['variant']}**" if row.get("role") == "ours" else row["variant"] or ""
    return [
        f"{row['case']} {row['direction']}".strip(), name, time_us, number("gb_s"), number("tflop_s"),
        number("percent_of_ceiling", ".0f"), number("speedup_over_best_rival", ".2f"), number("extra_mib"),
        number("host_us"), number("error", ".1g"), "; ".join(notes),
    ]  # fmt: skip
