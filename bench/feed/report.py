"""Markdown tables of the rows that `bench.data` writes."""

from __future__ import annotations

from collections.abc import Sequence

from bench.ops.report import where
from bench.records import Row, problem, table


def markdown(rows: Sequence[Row]) -> str:
    """Return the lines of the index and the tables of rates and of waits."""
    if not rows:
        return ""
    parts = [f"## data\n\n{where(rows)} {rows[0]['workers']} threads or worker processes.\n"]
    parts += [f"{index_line(row)}\n" for row in rows if row["case"] == "index"]
    for name, make in (("rates", rate_table), ("waits", wait_table)):
        if own := [row for row in rows if row["case"] != "index" and (row["case"] == "waits") == (name == "waits")]:
            parts.append("\n".join(make(own)) + "\n")
    return "\n".join(parts)


def line(row: Row) -> str:
    """Return a row as a line, for the terminal."""
    if row["case"] == "index":
        return index_line(row)
    return (wait_table if row["case"] == "waits" else rate_table)([row])[-1]


def rate_table(rows: Sequence[Row]) -> list[str]:
    columns = "images|reader|images/s [p20, p80]|images/s per core [p20, p80]|x best rival|x best rival per core|note"
    return table(columns, map(_rates, rows))


def _rates(row: Row) -> list[str]:
    def rate(name: str) -> str:
        return f"{row[name]:,.0f} [{row[f'{name}_p20']:,.0f}, {row[f'{name}_p80']:,.0f}]" if name in row else ""

    def ratio(name: str) -> str:
        return f"{row[f'{name}_over_best_rival']:.2f}" if f"{name}_over_best_rival" in row else ""

    name = f"**{row['variant']}**" if row["role"] == "ours" else row["variant"] or ""
    both = ("images_per_s", "images_per_cpu_s")
    return [row["case"], name, *map(rate, both), *map(ratio, both), _note(row)]


def wait_table(rows: Sequence[Row]) -> list[str]:
    columns = "waits of|images|batch|step ms|step ms without the feed|wait ms: median, p95, most|"
    return table(columns + "share of the time waited|steps over 1 ms, over 1 %|note", map(_waits, rows))


def _waits(row: Row) -> list[str]:
    if "step_ms" not in row:
        return [row["variant"], row["images"] or "", _note(row)]
    waits = ", ".join(f"{row[name]:.2f}" for name in ("wait_ms_median", "wait_ms_p95", "wait_ms_max"))
    return [
        row["variant"], row["images"], str(row["batch_size"]), f"{row['step_ms']:.1f}",
        f"{row['step_ms_without_feed']:.1f}", waits, f"{row['share_waited']:.2%}",
        f"{row['steps_over_1_ms']:.0%}, {row['steps_over_1_percent']:.0%}", _note(row),
    ]  # fmt: skip


def index_line(row: Row) -> str:
    """Return the figures of the index in a line."""
    if row["status"] != "ok":
        return f"index: {_note(row)}"
    return (
        f"index: {row['indexed_per_cpu_s']:,.0f} of {row['images']} images a second and core (thorough); a manifest of "
        f"{row['entries']:,} entries and {row['file_mib']:.0f} MiB opens in {row['load_s']:.2f} s and takes "
        f"{row['load_mib']:.0f} MiB of memory"
    )


def _note(row: Row) -> str:
    notes = [] if row["status"] == "ok" else [problem(row)]
    if row.get("delivers"):
        notes.append(row["delivers"])
    if row.get("precision"):
        notes.append(f"{row['precision']}, {row['compiled']}")
    return "; ".join(notes)
